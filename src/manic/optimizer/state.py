"""The state of Mechanic between steps: what exists from when on, what a load makes of it, what is a placeholder.

It keeps references and Delta under each parameter, the tuner in the param groups, and does not know what a step does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from manic.distributed.collectives import on_any_rank, raise_together
from manic.distributed.drift import raise_if_drifted
from manic.distributed.layout import Layout, local, local_storage
from manic.optimizer.fit import drop_misfits, first_misfit, misfit, remove_own
from manic.optimizer.joint import parameter_states
from manic.optimizer.loaded import LoadedStarts
from manic.optimizer.names import DELTA, STATE_KEYS, X_REF, describe, short_name
from manic.optimizer.placeholders import Placeholders
from manic.optimizer.references import References
from manic.optimizer.transaction import hidden
from manic.optimizer.wrapper import is_creating_state
from manic.step.guard import Reading
from manic.step.kernels import working_dtype
from manic.step.position import Position, displaced
from manic.step.rules import rule_for
from manic.tuners.base import Proposal, Tuner
from manic.tuners.state import TunerState

__all__ = ["MechanicState"]

# The number of updates in a saved tuner whose checkpoint holds no training yet, only the shape of its state.
_PLACEHOLDER = -1.0


class MechanicState:
    """References and Delta under each parameter, the tuner in the param groups.

    Args:
        optimizers: The base optimizers.
        tuner: Whose state is kept, on the parameters' device.
        layout: Tells the device of a rank without parameters, and whom to compare with.
        store_delta: Whether Delta is kept, in at least float32, or recomputed from x, x_ref and S. Default: the rule's.
    """

    def __init__(self, optimizers: Sequence[Optimizer], tuner: Tuner, layout: Layout, store_delta: bool | None) -> None:
        self._optimizers, self._tuner, self._layout = optimizers, tuner, layout
        if store_delta not in (None, True, False):
            raise ValueError(f"store_delta must be True, False or None, got {store_delta!r}")
        self.rule = rule_for(tuner.scales, tuner.eps)
        self.store_delta = self.rule.stores_delta if store_delta is None else store_delta
        """``None``: only of parameters in low precision."""
        self.tuner_state, self.references = TunerState(tuner), References(tuner.references)
        self.started = False
        """Whether the run has begun."""
        self.was_loaded = False
        """Whether a loaded state is yet to be compared with the parameters."""
        self._loaded = LoadedStarts([], self.references.names, 0)
        self.updates_made: int | None = 0
        """The tuner's count as the host knows it; ``None`` where replays of a CUDA graph were not counted."""
        self.has_scale = False
        """Whether the host knows that S is not 0."""
        self._placeholders = Placeholders(optimizers, STATE_KEYS)
        if self.home_device.type != "meta":  # otherwise the model is still to be materialised
            self.tuner_state.to(self.home_device)

    @property
    def home_device(self) -> torch.device:
        """The device of the first parameter; of the process group's backend where this rank has none."""
        for group in self._groups:
            for parameter in group["params"]:
                return local_storage(parameter).device
        return self._layout.communication_device(torch.device("cpu"))

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    @property
    def position(self) -> Position:
        """Where parameters are now."""
        return self.rule.position(self.tuner_state.scale)

    # What a plan asks for: see manic.step.plan.Displacements.

    def keeps_delta(self, parameter: Tensor) -> bool:
        """Whether Delta of ``parameter`` is stored."""
        if self.store_delta is None:
            return parameter.dtype != working_dtype(parameter)
        return self.store_delta

    def found(self, optimizer: Optimizer, parameter: Tensor) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
        """References and Delta as they are stored; changes nothing."""
        state = optimizer.state.get(parameter)
        return self.references.found(state), state.get(DELTA) if state else None

    def complete(self, optimizer: Optimizer, parameter: Tensor, position: Position) -> None:
        """Store references, and Delta where it is kept: new ones, or what a load left of them."""
        state = optimizer.state.setdefault(parameter, {})
        dtype, keeps_delta = working_dtype(parameter), self.keeps_delta(parameter)
        if found := misfit(parameter, state):
            raise ValueError(f"{describe(parameter, self._groups)}: {found}; call rebase() before the step")
        starts_here = X_REF not in state
        if starts_here:
            remove_own(state)
        self.references.complete(parameter, state)
        if not keeps_delta:
            state.pop(DELTA, None)
        if keeps_delta and DELTA not in state:
            state[DELTA] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            if not starts_here:  # saved with store_delta=False
                x = local(parameter)
                divisor = position.divisor_for(x)  # as it was recomputed by then
                if self._tuner.moves_without_gradient:  # x must be x_ref + f * Delta to the last digits
                    factor = position.factor_for(x)
                    divisor = torch.where(factor > 0, factor, divisor)
                local(state[DELTA]).copy_((x.to(dtype) - local(state[X_REF])) / divisor)
        elif keeps_delta and state[DELTA].dtype != dtype:
            state[DELTA] = state[DELTA].to(dtype)

    # What a step asks for.

    def begin(self) -> None:
        """A run starts from where its parameters are now; what was only made to be looked at is forgotten."""
        if self._placeholders.exist:
            self.tuner_state.reset()
        self._placeholders.clear()
        self._remove_own()
        self.updates_made, self.has_scale = 0, False

    def _remove_own(self) -> None:
        for _, _, state in parameter_states(self._optimizers):
            remove_own(state)

    @property
    def stands(self) -> str:
        """Where the run is, in words. The host waits for the device."""
        if not self.started:
            return "begins"
        return f"goes on after {int(self.tuner_state.updates)} steps with S={float(self.tuner_state.scale)!r}"

    def commit(self, proposal: Proposal, reading: Reading | None) -> None:
        """Take over the tuner's proposal.

        Args:
            proposal: Of the step.
            reading: Its numbers, if the host has read them. Otherwise the host asks for S, as long as late sums depend
                on whether there is one.
        """
        if not self.has_scale:
            asks = self._tuner.late_until_scale
            self.has_scale = bool(proposal.scale > 0) if asks else reading is not None and reading.scale > 0
        self.tuner_state.commit(proposal)
        self.started = True

    def restorer(self) -> Callable[[], None]:
        """A function that undoes :meth:`commit`."""
        tensor, has_scale, started = self.tensor.clone(), self.has_scale, self.started

        def restore() -> None:
            self.tensor.copy_(tensor)
            self.has_scale, self.started = has_scale, started

        return restore

    def count_update(self, is_counted: bool) -> None:
        """Know of a step that was taken; a CUDA graph's replays are not counted."""
        self.updates_made = None if self.updates_made is None or not is_counted else self.updates_made + 1

    @property
    def may_restart(self) -> bool:
        """Whether the number of updates, as far as the host knows it, is one after which the tuner may restart."""
        interval = self._tuner.restart_interval
        return interval > 0 and (self.updates_made is None or self.updates_made % interval == 0)

    def rebase(self) -> None:
        """Let every reference be x, and Delta 0."""
        drop_misfits(self._optimizers)
        for _, parameter, state in parameter_states(self._optimizers):
            self.references.move_to(parameter, state)
            if DELTA in state:
                local(state[DELTA]).zero_()
        self.tuner_state.rebase()
        self.was_loaded = False

    def is_creating(self, exists: bool) -> bool:
        """Whether this step is none, but torch's checkpointing, which wants to see what state there will be."""
        return not exists and is_creating_state()

    def has_no_gradient(self) -> bool:
        """Whether all gradients of all ranks are 0, or there is none: frameworks step so to create state.

        Every rank must call it. The host waits for the device.
        """
        gradients = [p.grad for group in self._groups for p in group["params"] if p.grad is not None]
        # Of a Partial gradient, this rank's part: no collective in a loop that ranks leave at different places.
        # Of one on the meta device, nothing is known.
        found = any(each.is_meta or bool((each != 0).any()) for each in map(local_storage, gradients))
        return not on_any_rank(found, self._layout.group, self._layout.communication_device(self.home_device))

    def create(self) -> None:
        """Let base optimizers without a state create it, and change nothing else.

        It is a placeholder, marked as one in the tuner's state, and is created again at the first real step.
        """
        starts = [
            (local(parameter), local(optimizer.state[parameter][X_REF]))
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
            if X_REF in optimizer.state.get(parameter, {})
        ]
        try:
            self._placeholders.create(hidden(self._optimizers))
        except BaseException:
            self._placeholders.clear()
            self._remove_own()
            raise
        finally:
            for x, x_ref in starts:
                x.copy_(x_ref)
        if self._placeholders.exist:
            self.tuner_state.updates.fill_(_PLACEHOLDER)

    def compare_exchanged(self) -> None:
        """Refuse parameters, in the middle of a run, whose state is another's or does not tell where they are.

        Raises:
            ValueError: on every rank alike.
        """
        if not self.started:
            return
        group, device = self._layout.group, self._layout.communication_device(self.home_device)
        raise_together(ValueError, first_misfit(self._optimizers), group, device)
        if not self.was_loaded:
            self.raise_if_displaced(
                ValueError,
                "parameters were exchanged or added since the last step, and these are not where their state says. If "
                "that is on purpose, call rebase() before the step",
            )

    # Loading.

    def compare_loaded(self) -> None:
        """Refuse a loaded state that the parameters do not belong to: the step would move them to where it says.

        Raises:
            ValueError: on every rank alike, if one was loaded and they are elsewhere, or it lacks references.
        """
        if self.was_loaded:
            group, device = self._layout.group, self._layout.communication_device(self.home_device)
            self._loaded.check(self._groups, group, device)
            self.raise_if_displaced(
                ValueError,
                "they are not where the loaded optimizer state says. Load the model from the same checkpoint; read a "
                "checkpoint of the base optimizer alone before the first step, or by load_state_dict; if the "
                "parameters were changed on purpose, call rebase() before the step",
            )
            self.was_loaded = False

    def raise_if_drifted(self) -> None:
        """Raise on every rank if ranks that should hold the same do not, or parameters are displaced.

        Raises:
            RuntimeError: with the first difference in words.
        """
        absent = torch.empty(0, device=self.home_device)
        own = [*((short_name(reference), reference) for reference in self.references.names), ("Delta", DELTA)]
        held = [
            (parameter, name, optimizer.state.get(parameter, {}).get(key, absent) if key else parameter)
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
            for name, key in (("the value", None), *own)
        ]
        device = self._layout.communication_device(self.home_device)
        raise_if_drifted(self.tensor, self.tuner_state.scale, self._groups, held, self._layout, device)
        if self.started:
            self.raise_if_displaced(
                RuntimeError,
                "since the last step something else has changed them, which the next step will undo; if it was on "
                "purpose, call rebase() after such a change",
            )

    def raise_if_displaced(self, kind: type[Exception], advice: str) -> None:
        """Raise on every rank if parameters are not at x_ref + f * Delta (not seen where Delta is not stored).

        Args:
            kind: What to raise.
            advice: What it may mean, and what to do.
        """
        moved = [
            (parameter, state)
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad and (state := optimizer.state.get(parameter, {})).keys() >= {X_REF, DELTA}
        ]
        places = [(local(parameter), local(state[X_REF]), local(state[DELTA])) for parameter, state in moved]
        found = displaced(places, self.position.factor, not self._tuner.moves_without_gradient)
        complaint = ""
        if found:
            complaint = (
                f"{len(found)} of {len(places)} parameters are not {self.rule.place}, the first being "
                f"{describe(moved[found[0]][0], self._groups)}: {advice}"
            )
        raise_together(kind, complaint, self._layout.group, self._layout.communication_device(self.home_device))

    # What the wrapper asks for: see manic.optimizer.wrapper.OwnState.

    @property
    def tensor(self) -> Tensor:
        """The tuner's state, which is kept in every param group."""
        return self.tuner_state.tensor

    @property
    def exists(self) -> bool:
        """Whether the run has begun."""
        return self.started

    def check(self, saved: Tensor) -> None:
        """Raise ValueError unless ``saved`` can be loaded."""
        self.tuner_state.check(saved)

    def load(self, saved: Tensor | None) -> None:
        """Copy a loaded one into it; ``None``: the checkpoint is of the base optimizers alone."""
        if saved is None:
            self.tuner_state.reset()
        else:
            self.tuner_state.load(saved)
        updates = float(self.tuner_state.updates)
        self.updates_made, self.has_scale = max(0, int(updates)), float(self.tuner_state.scale) > 0.0
        self.started = self.was_loaded = updates > 0
        self._loaded = LoadedStarts(self._optimizers, self.references.names, int(updates))
        self._placeholders.exist = False
        if updates == _PLACEHOLDER:
            self._placeholders.loaded()
