"""Which references a loaded state has: a tuner goes on only where each parameter that was trained has all."""

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
from manic.optimizer.names import STATE_KEYS, X_REF, describe, short_name

__all__ = ["LoadedStarts"]


class LoadedStarts:
    """What a load left, noted before a step adds to it.

    Args:
        optimizers: The base optimizers.
        references: Which a parameter that was trained has, x_ref first.
        updates: How many the loaded tuner has made.
    """

    def __init__(self, optimizers: Sequence[Optimizer], references: Sequence[str], updates: int) -> None:
        self._updates = updates
        states = [(parameter, state) for _, parameter, state in parameter_states(optimizers)]
        self._exist = any(X_REF in state for _, state in states)
        lacking = [
            (parameter, state, missing[0])
            for parameter, state in states
            if (missing := [name for name in references if name not in state]) and local_storage(parameter).numel()
        ]
        self._lacking: list[tuple[Tensor, str]] = []
        if self._exist and lacking and updates > 0:
            # A base that has taken steps on its own counts those, too, of parameters without a gradient since.
            before = max(_steps(state) or 0 for _, state in states if X_REF in state) - updates
            self._lacking = [
                (parameter, short_name(missing))
                for parameter, state, missing in lacking
                if X_REF in state or _is_trained(state, max(before, 0))
            ]

    def check(self, groups: Sequence[Mapping[str, Any]], group: ProcessGroup | None, device: torch.device) -> None:
        """Refuse a tuner that was loaded without references of all, or of some parameters that it was trained with.

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
        if lacking := [each for each in self._lacking if id(each[0]) in live]:
            parameter, name = lacking[0]
            problem = (
                f"the loaded state has no {name} of {len(lacking)} parameters that the base optimizer has trained, and "
                f"has that of others; the first is {describe(parameter, groups)}. Load the whole state of one "
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
