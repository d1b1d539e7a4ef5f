"""Which x_ref a loaded state has: a tuner goes on only where each parameter that was trained has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from manic.distributed.collectives import on_any_rank, raise_together
from manic.distributed.layout import local_storage
from manic.distributed.parts import plain_parts
from manic.optimizer.joint import parameter_states
from manic.optimizer.names import STATE_KEYS, X_REF, describe

__all__ = ["LoadedStarts"]


class LoadedStarts:
    """What a load left, noted before a step adds to it.

    Args:
        optimizers: The base optimizers.
        updates: How many the loaded tuner has made.
    """

    def __init__(self, optimizers: Sequence[Optimizer], updates: int) -> None:
        self._updates = updates
        states = [(parameter, state) for _, parameter, state in parameter_states(optimizers)]
        self._exist = any(X_REF in state for _, state in states)
        lacking = [each for each in states if X_REF not in each[1] and local_storage(each[0]).numel()]
        self._lacking: list[Tensor] = []
        if self._exist and lacking and updates > 0:
            # A base that has taken steps on its own counts those, too, of parameters without a gradient since.
            before = max(_steps(state) or 0 for _, state in states if X_REF in state) - updates
            self._lacking = [parameter for parameter, state in lacking if _is_trained(state, max(before, 0))]

    def check(self, groups: Sequence[Mapping[str, Any]], group: ProcessGroup | None, device: torch.device) -> None:
        """Refuse a tuner that was loaded without x_ref of all, or of some parameters that it was trained with.

        Args:
            groups: The param groups, for the message.
            group: The process group, or ``None`` for this process alone.
            device: A device that the group's backend supports.

        Raises:
            ValueError: on every rank alike.
        """
        if not on_any_rank(self._exist, group, device):
            raise ValueError(
                f"the loaded tuner has made {self._updates} updates, but no rank has an x_ref of any parameter: the "
                "parameters' state was not loaded with it. Load both from one checkpoint; or load the base optimizer's "
                "state alone, without the tuner, to start with a new one; or call rebase() to go on with this tuner "
                "from where the parameters are"
            )
        problem = ""
        live = {id(parameter) for each in groups for parameter in each["params"] if parameter.requires_grad}
        if lacking := [parameter for parameter in self._lacking if id(parameter) in live]:
            problem = (
                f"the loaded state has no x_ref of {len(lacking)} parameters that the base optimizer has trained, and "
                f"has that of others; the first is {describe(lacking[0], groups)}. Load the whole state of one "
                "checkpoint, or call rebase() to go on with this tuner from where the parameters are"
            )
        raise_together(ValueError, problem, group, device)


def _steps(state: Mapping[str, Any]) -> float | None:
    """The number of steps that a base has counted of a parameter; ``None``: it does not count them."""
    steps = state.get("step")
    if isinstance(steps, Tensor):
        return float(local_storage(steps)) if local_storage(steps).numel() == 1 else None
    return float(steps) if isinstance(steps, (int, float)) else None


def _is_trained(state: Mapping[str, Any], before: float) -> bool:
    """Whether a base has stepped with a parameter since its first ``before`` steps; some create zeros without one."""
    steps = _steps(state)
    if steps is not None:
        return steps > before
    values = [value for key, value in state.items() if key not in STATE_KEYS and isinstance(value, Tensor)]
    return any(bool(part.any()) for value in values for part in plain_parts(value))
