"""Whether x_ref and Delta under a parameter are still that parameter's: of its shape and placements, and where it is.

Parameters are exchanged, grown, taken out of their groups or materialised on another device. It compares tensors by
what they are, and reads no element.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from manic.distributed.layout import local_storage
from manic.distributed.sample import sample_shape
from manic.optimizer.joint import parameter_states
from manic.optimizer.names import REFERENCES, STATE_KEYS, X_REF, describe
from manic.optimizer.references import is_of_sample

__all__ = ["drop_misfits", "first_misfit", "misfit", "remove_own"]

_ADVICE = (
    "if it was exchanged on purpose, call rebase() before the step, which starts its displacement from where it is now"
)


def misfit(parameter: Tensor, state: dict[str, Any]) -> str:
    """What of ours in ``state`` is not ``parameter``'s, in words; empty if all is."""
    for key in STATE_KEYS:
        tensor = state.get(key)
        if tensor is not None and not _is_alike(parameter, tensor, may_be_of_sample=key in REFERENCES):
            here, there = local_storage(tensor), local_storage(parameter)
            return (
                f"its state {key} has shape {tuple(tensor.shape)}, on this rank {tuple(here.shape)} on {here.device}, "
                f"and the parameter {tuple(parameter.shape)}, on this rank {tuple(there.shape)} on {there.device}"
            )
    return ""


def first_misfit(optimizers: Sequence[Optimizer]) -> str:
    """The first parameter whose state is not its own, or that is in no group any more, in words; empty: none."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if found := misfit(parameter, optimizer.state.get(parameter, {})):
                    return f"{describe(parameter, groups)}: {found}; {_ADVICE}"
    gone = [parameter for parameter, _ in _strays(optimizers)]
    if gone:
        return (
            f"{len(gone)} parameters that earlier steps have moved are in no param group any more, the first of shape "
            f"{tuple(gone[0].shape)}. A step learns from all parameters together, so they cannot be stepped part "
            "by part (DeepSpeed's ZeRO does that with several param groups or sub-groups: call "
            "manic.integrations.deepspeed.whole_model_steps(engine) after deepspeed.initialize). If they were taken "
            "out on purpose, call rebase() before the step, or delete their entries of optimizer.state"
        )
    return ""


def drop_misfits(optimizers: Sequence[Optimizer]) -> None:
    """Remove what of ours is no parameter's, so that it is made again."""
    for _, parameter, state in parameter_states(optimizers):
        if misfit(parameter, state):
            remove_own(state)
    for _, state in _strays(optimizers):
        remove_own(state)


def remove_own(state: dict[str, Any]) -> None:
    """Remove what is ours from a parameter's state."""
    for key in STATE_KEYS:
        state.pop(key, None)


def _strays(optimizers: Sequence[Optimizer]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Parameters with an x_ref that are in no group, with their state."""
    members = {id(each) for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]}
    for _, parameter, state in parameter_states(optimizers):
        if id(parameter) not in members and X_REF in state:
            yield parameter, state


def _is_alike(parameter: Tensor, tensor: Tensor, *, may_be_of_sample: bool) -> bool:
    is_of_part = may_be_of_sample and is_of_sample(parameter, tensor.shape)
    if isinstance(parameter, DTensor) != isinstance(tensor, DTensor):
        return False
    if parameter.shape != tensor.shape and not is_of_part:
        return False
    if isinstance(parameter, DTensor) and isinstance(tensor, DTensor) and parameter.placements != tensor.placements:
        return False
    here, there = local_storage(tensor), local_storage(parameter)
    shape = sample_shape(there.shape) if is_of_part else there.shape
    return here.shape == shape and here.device == there.device
