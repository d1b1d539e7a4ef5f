"""What a step asks of all ranks: sums, the tuner's proposal from them, and whether the step is to be taken.

It knows no parameter: captures give this rank's share of the sums, and the guard judges the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from manic.distributed.collectives import on_any_rank
from manic.optimizer.kinds import largest_lr
from manic.optimizer.state import MechanicState
from manic.step.deferral import Deferral
from manic.step.guard import Guard, Reading, account_of_nonfinite
from manic.step.plan import Plan
from manic.step.sums import DEFERRALS, GRADIENTS, PendingSums, local_sums
from manic.tuners.base import Proposal

__all__ = ["Survey"]


class Survey:
    """The sums of a step over all ranks, and what follows from them before x is written.

    Args:
        state: With the tuner, its state, and the layout of the ranks.
        guard: Decides on sums that are not finite.
    """

    def __init__(self, state: MechanicState, guard: Guard) -> None:
        self._state, self._guard = state, guard
        self._interval = 1
        self._sums_fit = False

    def may_defer(self, plan: Plan) -> bool:
        """Whether the host need not wait for the sums of this step.

        The base optimizers must be able to leave it out on the device, with all of their state there from a step
        before, and float32 must have had room for the last step's products: nothing is multiplied again without the
        host. Ranks may differ in it.
        """
        return self._guard.may_defer and self._sums_fit and plan.can_be_left_out and plan.was_taken

    def settle(self, plan: Plan) -> tuple[Proposal, Reading] | None:
        """What became of the last step, if the host of this rank did not wait for it. Every rank must call it.

        Args:
            plan: Of the step that begins.

        Raises:
            NonfiniteError: on every rank alike, if the last step was left out and parameters are not finite.
        """
        state, last = self._state, self._state.deferral
        if last is None:
            return None
        state.deferral, reading = None, last.read()
        self._note_fit(reading)
        if not reading.is_finite:
            if last.is_counted:
                state.uncount_update()
            self._is_skipped(plan, reading)
        return (last.proposal, reading) if last.is_counted else None

    def begin(
        self,
        plan: Plan,
        grad_norm: float | Tensor | None,
        *,
        defers: bool = False,
        is_repeated: bool = False,
        exact: bool = False,
    ) -> PendingSums:
        """Start the early sums of a step: those of the tuner, if they are due, and what the guard needs.

        Args:
            plan: The step's.
            grad_norm: What the caller knows of the gradients: not finite if one of them is not. ``None``: nothing.
            defers: Whether the host does not wait for them.
            is_repeated: Whether a CUDA graph captures the step.
            exact: Multiply in float64.
        """
        state, tuner = self._state, self._state.tuner
        # A CUDA graph repeats one step, and with a scale per group the sums say which groups learn.
        has_rests = state.updates_made is not None and not state.is_per_group and all(state.has_scale)
        self._interval = tuner.interval(state.updates_made or 0) if has_rests and not is_repeated else 1
        is_due = self._interval == 1 or (state.updates_made or 0) % self._interval == 0
        # The same on all ranks, whatever each of them holds.
        names = tuner.sums if is_due else (GRADIENTS, *({"lr"} & set(tuner.sums)))
        if self._guard.may_defer:
            names = DEFERRALS, *names
        return self.start(
            plan, names, checks_gradients=self._guard.waits, grad_norm=grad_norm, defers=defers, exact=exact
        )  # fmt: skip

    def propose(self, pending: PendingSums) -> Proposal:
        """Wait for the sums of :meth:`begin`, and let the tuner learn from them."""
        return self._state.tuner.propose(self._state.tensor, pending.wait(), self._interval)

    def start(
        self,
        plan: Plan,
        names: Sequence[str],
        *,
        checks_gradients: bool = False,
        grad_norm: float | Tensor | None = None,
        defers: bool = False,
        late: bool = False,
        exact: bool = False,
    ) -> PendingSums:
        """Start sums over the local shards and the all_reduce over the ranks.

        Args:
            plan: The step's.
            names: Which sums.
            checks_gradients: Whether they are to be finite only if every gradient is.
            grad_norm: What the caller knows of the gradients.
            defers: Whether the host does not wait for them.
            late: Whether the base step was taken; then only what still needs late sums is summed over.
            exact: Multiply in float64.
        """
        state, shape = self._state, self._state.tuner_state.shape
        captures, place = plan.captures, state.layout.place_among_stages
        if late:
            captures = [each for each in captures if state.tuner.late(state.has_scale[each.first.column])]
        if shape:  # the learning rate of an empty group is another rank's matter
            lrs = [largest_lr([group]) if group["params"] else None for group in state.groups]
        else:
            lrs = [largest_lr(state.groups)]
        sums = local_sums(
            captures, names, state.tuner_state.parts[0], checks_gradients=checks_gradients, grad_norm=grad_norm,
            defers=defers, scales=len(state.tuner_state.parts), lrs=lrs, place=place, late=late, exact=exact,
        )  # fmt: skip
        device = state.communication_device
        return PendingSums(sums, names, shape, state.layout.group, device, lr_by_rank=place is not None)

    def decide(
        self, plan: Plan, pending: PendingSums, grad_norm: float | Tensor | None
    ) -> tuple[Proposal, Reading] | None:
        """The tuner's proposal, and its numbers on the host: the step's one host sync. ``None``: leave the step out."""
        proposal = self.propose(pending)
        reading = Reading.of(proposal)
        self._note_fit(reading)
        if any(reading.sums.get(DEFERRALS, ())):  # those ranks go on as they are, and settle it in the next step
            if not reading.is_finite:
                self._state.deferral = Deferral(proposal, is_counted=False)
                return None
        elif not reading.fits_float32:
            proposal = self.propose(self.begin(plan, grad_norm, exact=True))
            reading = Reading.of(proposal)
        return None if not reading.is_finite and self._is_skipped(plan, reading) else (proposal, reading)

    def refine(self, plan: Plan, proposal: Proposal, reading: Reading | None) -> tuple[Proposal, Reading | None]:
        """The proposal once late sums are known, if the tuner needs any; and its numbers, if they are known still."""
        state, tuner = self._state, self._state.tuner
        late = tuner.late(all(state.has_scale))
        if late and tuner.late_until_scale and state.is_per_group:
            # A frozen group would ask for a second all_reduce in every step. All ranks have the same numbers.
            reading = reading or Reading.of(proposal)
            wanting = [column for column, has in enumerate(state.has_scale) if not has]
            # A step that is left out has no late sums: ranks that have waited for it are out of it by now.
            if not reading.is_finite or not any(map(reading.moves, wanting)):
                return proposal, reading
        if not late:
            return proposal, reading
        sums = self.start(plan, late, late=True, exact=tuner.late_until_scale).wait()
        return tuner.refine(state.tensor, proposal, sums, self._interval), None

    def scales(self, plan: Plan, proposal: Proposal | None, reading: Reading | None) -> Sequence[float | Tensor]:
        """Each S, as a number if the host knows it, else as a 0-dim tensor; none before there is a proposal.

        Where steps are deferred, all steps take tensors: on a device they are rounded to another dtype than numbers.
        """
        if reading is not None and not (self._guard.may_defer and plan.can_be_left_out):
            return reading.scales
        return [] if proposal is None else proposal.scale.reshape(-1).unbind()

    def _note_fit(self, reading: Reading) -> None:
        """A step without sums over gradients says nothing, unless it was left out."""
        if "grad_square" in reading.sums or not reading.is_finite:
            self._sums_fit = reading.fits_float32

    def _is_skipped(self, plan: Plan, reading: Reading) -> bool:
        """Whether a step whose sums are not finite is left out; otherwise it is an error."""
        state = self._state

        def position_is_finite() -> bool:
            tensors = [each for shard in plan.shards for each in (shard.x, shard.delta) if each is not None]
            is_found = not all(bool(each.isfinite().all()) for each in tensors)
            return not on_any_rank(is_found, state.layout.group, state.communication_device)

        def account() -> str:
            return account_of_nonfinite(plan.shards, state.groups, state.layout.group)

        number = int(state.tuner_state.updates) + 1
        return self._guard.skips(reading.sums.get("lr", ()), number, position_is_finite, account)
