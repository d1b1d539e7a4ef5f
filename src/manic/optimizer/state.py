"""The state of Mechanic between steps: what exists from when on, what a load makes of it, what is a placeholder.

It knows x_ref, Delta and the tuner as tensors that are made, kept and loaded, and nothing of what a step does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from manic.distributed.layout import Layout, local
from manic.distributed.startup import raise_together
from manic.optimizer.wrapper import OptimizerWrapper, is_creating_state
from manic.step.capture import strays
from manic.step.kernels import working_dtype
from manic.tuners.base import UPDATES, Tuner

__all__ = ["DELTA", "X_REF", "MechanicState"]

X_REF = "mechanic_x_ref"
DELTA = "mechanic_delta"
# The number of updates in a saved tuner whose checkpoint holds no training yet, only the shape of its state.
_PLACEHOLDER = -1.0


class MechanicState(OptimizerWrapper):
    """x_ref and Delta under each parameter, the tuner in the param groups.

    Args:
        optimizers: The base optimizers.
        tuner: It is moved to the parameters' device.
        layout: Tells the device of a rank without parameters.
        store_delta: Whether Delta is kept, in at least float32, or recomputed from x, x_ref and S. ``None``: kept of
            parameters in low precision.
    """

    STATE_KEYS = (X_REF, DELTA)
    GROUP_KEY = "mechanic"

    def __init__(self, optimizers: Sequence[Optimizer], tuner: Tuner, layout: Layout, store_delta: bool | None) -> None:
        self._tuner, self._layout, self._store_delta = tuner, layout, store_delta
        # Whether the run has begun, so that x_ref is where it started; and whether a loaded state is yet to be checked.
        self._started = False
        self._was_loaded = False
        self._state_is_placeholder = False
        # Which bases' state is a placeholder then, see _create_state; those that came with a state keep theirs.
        self._came_with_state = [bool(base.state) for base in optimizers]
        self._placeholders = [not came for came in self._came_with_state]
        self._created: list[dict[Any, Any] | None] = [None for _ in optimizers]
        super().__init__(optimizers)
        self._tuner.to(self._home_device())
        self._share_global_state()

    def _complete(self, state: dict[str, Any], parameter: Tensor, scale: Tensor) -> None:
        """Make ``state`` hold x_ref, and Delta where it is stored: new ones, or what a load left of them."""
        dtype = working_dtype(parameter)
        starts_here = X_REF not in state
        if starts_here:
            state[X_REF] = parameter.detach().clone()
        elif state[X_REF].dtype != parameter.dtype:
            state[X_REF] = state[X_REF].to(parameter.dtype)
        if not self._keeps_delta(parameter) or starts_here:
            state.pop(DELTA, None)
        if self._keeps_delta(parameter) and DELTA not in state:
            state[DELTA] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            if not starts_here:  # saved with store_delta=False
                divisor = scale + self._tuner.position[1]  # as it was recomputed by then
                if self._tuner.variant.moves_without_gradient:  # x must be x_ref + S * Delta to the last digits
                    divisor = torch.where(scale > 0, scale, divisor)
                local(state[DELTA]).copy_((local(parameter).to(dtype) - local(state[X_REF])) / divisor.to(dtype))
        elif self._keeps_delta(parameter) and state[DELTA].dtype != dtype:
            state[DELTA] = state[DELTA].to(dtype)

    def _keeps_delta(self, parameter: Tensor) -> bool:
        if self._store_delta is None:
            return parameter.dtype != working_dtype(parameter)
        return self._store_delta

    def _create_state(self, starts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Let base optimizers without a state create it, and change nothing else.

        Theirs then counts a step that was none. It is a placeholder that shows a checkpoint what names and shapes
        there are, is marked as one in the tuner's state, and is made again at the first real step.

        Args:
            starts: Local parameters and their x_ref, to which they are put back.
        """
        with self._own_state_hidden():
            self._placeholders = [not optimizer.state for optimizer in self.optimizers]
            for optimizer, placeholder in zip(self.optimizers, self._placeholders):
                if placeholder:
                    optimizer.step()
                    self._state_is_placeholder = True
        for x, x_ref in starts:
            x.copy_(x_ref)
        if self._state_is_placeholder:
            self._tuner.state[UPDATES].fill_(_PLACEHOLDER)
        self._created = [
            self._imprint(optimizer) if placeholder else None
            for optimizer, placeholder in zip(self.optimizers, self._placeholders)
        ]

    def _imprint(self, optimizer: Optimizer) -> dict[Any, Any]:
        """What tells a base's state that a step with zero gradients made from one that has seen training."""
        return {
            (parameter, name): local(value).item() if local(value).numel() == 1 else int(local(value).count_nonzero())
            for parameter, state in optimizer.state.items()
            for name, value in state.items()
            if name not in self.STATE_KEYS and isinstance(value, Tensor)
        }

    def _is_as_created(self, optimizer: Optimizer, created: dict[Any, Any] | None) -> bool:
        """Whether no checkpoint of the base alone was read into what was created, which leaves the tuner as it was."""
        # Entries may be gone: FSDP1 loads none of a parameter that this rank holds nothing of.
        return created is None or self._imprint(optimizer).items() <= created.items()

    def _drop_placeholders(self) -> None:
        """Forget what was only made to be looked at: a run starts from where its parameters are now."""
        for optimizer, placeholder in zip(self.optimizers, self._placeholders):
            if self._state_is_placeholder and placeholder:
                optimizer.state.clear()
            for state in optimizer.state.values():
                for key in self.STATE_KEYS:
                    state.pop(key, None)
        if self._state_is_placeholder:
            self._tuner.reset()
        self._state_is_placeholder = False

    def _parameters_with_state(self) -> set[int]:
        return {id(parameter) for optimizer in self.optimizers for parameter in optimizer.state}

    def _forget(self, known: set[int], is_first: bool) -> None:
        """Of a step that was not taken, leave no state that it has made: half of one would be taken for a whole one.

        Args:
            known: Which parameters had a state before, by identity.
            is_first: The run was to begin with it; the next step is the first then.
        """
        self._started = self._started and not is_first
        for optimizer in self.optimizers:
            for parameter, state in list(optimizer.state.items()):
                is_new = id(parameter) not in known
                if not (is_new or is_first) or not isinstance(state, dict):
                    continue
                if X_REF in state:  # where the parameter was when the step made it
                    local(parameter).copy_(local(state[X_REF]))
                for key in self.STATE_KEYS:
                    state.pop(key, None)
                if is_new:
                    del optimizer.state[parameter]

    def _is_creating_state(self) -> bool:
        """Whether this step is none, but torch's checkpointing, which wants to see what state there will be."""
        return not self._has_state() and is_creating_state()

    def _check_loaded(self) -> None:
        """Refuse a loaded state that the parameters do not belong to: the step would put them back where it says."""
        if self._was_loaded:
            self._raise_if_astray(
                ValueError,
                "they are not where the loaded optimizer state says. Load the model from the same checkpoint; read a "
                "checkpoint of the base optimizer alone before the first step, or by load_state_dict; if the "
                "parameters were changed on purpose, call rebase() before the step",
            )
            self._was_loaded = False

    def _raise_if_astray(self, kind: type[Exception], advice: str) -> None:
        """Raise on every rank if parameters are not x_ref + S * Delta, where the step would put them back."""
        moved = [
            (parameter, self.state[parameter])
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.requires_grad and self.state.get(parameter, {}).keys() >= {X_REF, DELTA}
        ]
        places = [(local(parameter), local(state[X_REF]), local(state[DELTA])) for parameter, state in moved]
        any_scale = not self._tuner.variant.moves_without_gradient
        astray = strays(places, self._tuner.position[0], any_scale)
        complaint = ""
        if astray:
            place = "x_ref + Delta" if self._tuner.variant.multiplies else "x_ref + S * Delta"
            complaint = (
                f"{len(astray)} of {len(places)} parameters are not {place}, the first being "
                f"{self.describe(moved[astray[0]][0])}: {advice}"
            )
        device = self._layout.communication_device(self._home_device())
        raise_together(kind, complaint, self._layout.group, device)

    def _has_state(self) -> bool:
        return self._started or super()._has_state()

    def _global_state(self) -> Tensor:
        return self._tuner.state

    def _check_global_state(self, saved: Tensor) -> None:
        self._tuner.check(saved)

    def _load_global_state(self, saved: Tensor | None) -> None:
        if saved is None:
            self._tuner.reset()
            self._state_is_placeholder = self._started = self._was_loaded = False
        else:
            self._tuner.load(saved)
            updates = float(self._tuner.updates)
            self._state_is_placeholder = updates == _PLACEHOLDER
            self._started = self._was_loaded = updates > 0
            if self._state_is_placeholder:
                self._placeholders = [
                    not came_with_state and self._is_as_created(optimizer, created)
                    for optimizer, came_with_state, created in zip(
                        self.optimizers, self._came_with_state, self._created
                    )
                ]

    def _home_device(self) -> torch.device:
        """The device of the first parameter; of the process group's backend where this rank has none."""
        for group in self.param_groups:
            for parameter in group["params"]:
                return local(parameter).device
        return self._layout.communication_device(torch.device("cpu"))
