"""The state of Mechanic between steps: what exists from when on, what a load makes of it, what is a placeholder.

It keeps references and Delta under each parameter, the tuner in the param groups, and does not know what a step does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from manic.distributed.collectives import from_every_rank, is_simulated, on_any_rank
from manic.distributed.layout import Layout, local, local_storage
from manic.distributed.sample import is_sampled
from manic.optimizer.fit import drop_misfits, misfit, remove_own
from manic.optimizer.joint import parameter_states
from manic.optimizer.loaded import LoadedStarts
from manic.optimizer.names import DELTA, STATE_KEYS, X_REF, describe
from manic.optimizer.placeholders import Placeholders
from manic.optimizer.references import References
from manic.optimizer.transaction import hidden
from manic.optimizer.wrapper import is_creating_state
from manic.step.deferral import Deferral
from manic.step.guard import Reading
from manic.step.kernels import working_dtype
from manic.step.position import Position
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
        per_group: Whether each param group has a scale of its own.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        tuner: Tuner,
        layout: Layout,
        store_delta: bool | None,
        *,
        per_group: bool = False,
    ) -> None:
        self.optimizers, self.tuner, self.layout = optimizers, tuner, layout
        if store_delta not in (None, True, False):
            raise ValueError(f"store_delta must be True, False or None, got {store_delta!r}")
        self.rule = rule_for(tuner.scales, tuner.eps)
        self.store_delta = self.rule.stores_delta if store_delta is None else store_delta
        """``None``: only of parameters in low precision."""
        self.tuner_state = TunerState(tuner, len(self.groups) if per_group else None)
        self.references = References(tuner.references)
        self.started = False
        """Whether the run has begun."""
        self.was_loaded = False
        """Whether a loaded state is yet to be compared with the parameters."""
        self.loaded = LoadedStarts([], self.references.names, 0)
        self.updates_made: int | None = 0
        """The tuner's count as the host knows it; ``None`` where replays of a CUDA graph were not counted."""
        self.has_scale = self._no_scale
        """Of the one S, or of that of each param group: whether the host knows that it is not 0."""
        self.deferral: Deferral | None = None
        """The last step's numbers, if the host is yet to read them."""
        self._placeholders = Placeholders(optimizers, STATE_KEYS)
        if self.home_device.type != "meta":  # otherwise the model is still to be materialised
            self.tuner_state.to(self.home_device)

    @property
    def home_device(self) -> torch.device:
        """The device of the first parameter; of the process group's backend where this rank has none."""
        for group in self.groups:
            for parameter in group["params"]:
                return local_storage(parameter).device
        return self.layout.communication_device(torch.device("cpu"))

    @property
    def communication_device(self) -> torch.device:
        """A device that the process group's backend supports."""
        return self.layout.communication_device(self.home_device)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The base optimizers' param groups."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def position(self) -> Position:
        """Where parameters are now."""
        return self.rule.position(self.tuner_state.scale)

    # What a plan asks for: see manic.step.plan.Displacements.

    @property
    def is_per_group(self) -> bool:
        """Whether each param group has an S of its own."""
        return self.tuner_state.is_per_group

    def keeps_delta(self, parameter: Tensor) -> bool:
        """Whether Delta of ``parameter`` is stored."""
        if self.store_delta is None:
            return parameter.dtype != working_dtype(parameter)
        return self.store_delta

    def is_sampled(self, parameter: Tensor) -> bool:
        """Whether a sample stands for ``parameter`` in early sums; where Delta is stored, x_ref must be whole."""
        return self.tuner.samples and not self.keeps_delta(parameter) and is_sampled(parameter)

    def found(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[list[Tensor | None]]:
        """What is stored under parameters: a list for each reference, x_ref first, and for Delta; ``None``: not."""
        none = dict[str, Any]()
        states = [optimizer.state.get(parameter, none) for parameter in parameters]
        return [[state.get(name) for state in states] for name in (*self.references.names, DELTA)]

    def complete(self, optimizer: Optimizer, parameter: Tensor, position: Position) -> None:
        """Store references, and Delta where it is kept: new ones, or what a load left of them."""
        state = optimizer.state.setdefault(parameter, {})
        dtype, keeps_delta = working_dtype(parameter), self.keeps_delta(parameter)
        if found := misfit(parameter, state):
            raise ValueError(f"{describe(parameter, self.groups)}: {found}; call rebase() before the step")
        starts_here = X_REF not in state
        if starts_here:
            remove_own(state)
        try:
            self.references.complete(parameter, state, of_sample=self.is_sampled(parameter))
        except ValueError as error:
            raise ValueError(f"{describe(parameter, self.groups)}: {error}; call rebase() before the step") from None
        if not keeps_delta:
            state.pop(DELTA, None)
        if keeps_delta and DELTA not in state:
            state[DELTA] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            if not starts_here:  # saved with store_delta=False
                x = local(parameter)
                divisor = position.divisor_for(x)  # as it was recomputed by then
                if self.tuner.moves_without_gradient:  # x must be x_ref + f * Delta to the last digits
                    factor = position.factor_for(x)
                    divisor = torch.where(factor > 0, factor, divisor)
                local(state[DELTA]).copy_((x.to(dtype) - local(state[X_REF])) / divisor)
        elif keeps_delta and state[DELTA].dtype != dtype:
            state[DELTA] = state[DELTA].to(dtype)

    def join(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Let the references of parameters lie side by side in memory, in this order."""
        self.references.join([optimizer.state[parameter] for parameter in parameters])

    # What a step asks for.

    def begin(self) -> bool:
        """Let the run start from where its parameters are now, if it has not; what was a placeholder is forgotten.

        Returns:
            Whether it starts.
        """
        if self.started:
            return False
        if self._placeholders.exist:
            self.tuner_state.reset()
        self._placeholders.clear()
        self._remove_own()
        self.updates_made, self.has_scale, self.deferral = 0, self._no_scale, None
        return True

    @property
    def _no_scale(self) -> tuple[bool, ...]:
        return tuple(False for _ in self.tuner_state.parts)

    def _known_scales(self, scale: Tensor) -> tuple[bool, ...]:
        """Which are not 0. The host waits for the device."""
        return tuple(each > 0.0 for each in scale.reshape(-1).tolist())

    def _remove_own(self) -> None:
        for _, _, state in parameter_states(self.optimizers):
            remove_own(state)

    @property
    def stands(self) -> str:
        """Where the run is, in words. The host waits for the device."""
        if not self.started:
            return "begins"
        return f"goes on after {int(self.tuner_state.updates)} steps with S={self.tuner_state.scale.tolist()!r}"

    def commit(self, proposal: Proposal, reading: Reading | None) -> None:
        """Take over the tuner's proposal.

        Args:
            proposal: Of the step.
            reading: Its numbers, if the host has read them. Otherwise the host asks for S, as long as late sums depend
                on whether there is one.
        """
        if not all(self.has_scale):
            if reading is not None:
                self.has_scale = tuple(each > 0.0 for each in reading.scales)
            elif self.tuner.late_until_scale:
                self.has_scale = self._known_scales(proposal.scale)
        self.tuner_state.commit(proposal)
        self.started = True

    def restorer(self) -> Callable[[], None]:
        """A function that undoes :meth:`commit`."""
        tensor, has_scale, started = self.tensor.clone(), self.has_scale, self.started

        def restore() -> None:
            self.tuner_state.write(tensor)
            self.has_scale, self.started = has_scale, started

        return restore

    def count_update(self, is_counted: bool) -> None:
        """Know of a step that was taken; a CUDA graph's replays are not counted."""
        self.updates_made = None if self.updates_made is None or not is_counted else self.updates_made + 1

    def uncount_update(self) -> None:
        """Know that the last step was left out after all."""
        self.updates_made = None if self.updates_made is None else self.updates_made - 1

    def rebase(self) -> None:
        """Let every reference be x, and Delta 0."""
        drop_misfits(self.optimizers)
        for _, parameter, state in parameter_states(self.optimizers):
            self.references.move_to(parameter, state)
            if DELTA in state:
                local(state[DELTA]).zero_()
        self.was_loaded = False

    def is_creating(self, exists: bool) -> bool:
        """Whether this step is none, but torch's checkpointing, which wants to see what state there will be."""
        return not exists and is_creating_state()

    def has_no_gradient(self) -> bool:
        """Whether all gradients of all ranks are 0, or there is none: frameworks step so to create state.

        Every rank must call it. The host waits for the device.
        """
        gradients = [p.grad for group in self.groups for p in group["params"] if p.grad is not None]
        # Of a Partial gradient, this rank's part: no collective in a loop that ranks leave at different places.
        # Of one on the meta device, nothing is known.
        found = any(each.is_meta or bool((each != 0).any()) for each in map(local_storage, gradients))
        return not on_any_rank(found, self.layout.group, self.communication_device)

    def create(self) -> None:
        """Let base optimizers without a state create it, and change nothing else.

        It is a placeholder, marked as one in the tuner's state, and is created again at the first real step.
        """
        starts = [
            (
                x := local(parameter),
                x.clone() if self.is_sampled(parameter) else local(optimizer.state[parameter][X_REF]),
            )
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
            if X_REF in optimizer.state.get(parameter, {})
        ]
        try:
            self._placeholders.create(hidden(self.optimizers))
        except BaseException:
            self._placeholders.clear()
            self._remove_own()
            raise
        finally:
            for x, before in starts:
                x.copy_(before)
        if self._placeholders.exist:
            self.tuner_state.set_updates(_PLACEHOLDER)

    # Loading.

    def complete_loaded(self) -> None:
        """Take the columns of groups that have no parameter on this rank from other ranks. Every rank must call it."""
        group = self.layout.group
        if self.is_per_group and group is not None and not is_simulated(group):
            self.tuner_state.complete(from_every_rank(self.tuner_state.loaded, group))
            self.has_scale = self._known_scales(self.tuner_state.scale)

    # What the wrapper asks for: see manic.optimizer.wrapper.OwnState.

    @property
    def tensor(self) -> Tensor:
        """The tuner's state, shape [rows, columns]."""
        return self.tuner_state.tensor

    @property
    def parts(self) -> Sequence[Tensor]:
        """What of it each param group keeps: all, or the group's column."""
        return self.tuner_state.parts if self.is_per_group else [self.tensor] * len(self.groups)

    @property
    def exists(self) -> bool:
        """Whether the run has begun."""
        return self.started

    def check(self, saved: Tensor) -> None:
        """Raise ValueError unless ``saved`` can be loaded."""
        self.tuner_state.check(saved)

    def load(self, found: Sequence[Tensor | None]) -> None:
        """Copy what each group held into it; if none held anything, the checkpoint is of the base optimizers alone."""
        self.tuner_state.load(*found)
        self._resume()

    def take(self, found: Sequence[Tensor | None]) -> None:
        """Load what a base optimizer has loaded into its groups, and follow groups that come and go."""
        before = self.tuner_state.parts
        if self.tuner_state.take(found):
            self._resume()
        elif self.tuner_state.parts is not before:
            self.has_scale = self._known_scales(self.tuner_state.scale)

    def _resume(self) -> None:
        self.deferral = None
        updates = float(self.tuner_state.updates)
        self.updates_made, self.has_scale = max(0, int(updates)), self._known_scales(self.tuner_state.scale)
        self.started = self.was_loaded = updates > 0
        self.loaded = LoadedStarts(self.optimizers, self.references.names, int(updates))
        self._placeholders.exist = False
        if updates == _PLACEHOLDER:
            self._placeholders.loaded()
