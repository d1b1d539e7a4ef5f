"""What a step asks of all ranks: sums, the tuner's proposal from them, and whether the step is to be taken.

It knows no parameter: captures give this rank's share of the sums, and the guard judges the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from manic.optimizer.kinds import largest_lr
from manic.optimizer.state import MechanicState
from manic.step.guard import Guard, Reading, account_of_nonfinite
from manic.step.plan import Plan
from manic.step.sums import PendingSums, local_sums
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

    def start(self, plan: Plan, names: Sequence[str], *, late: bool = False, exact: bool = False) -> PendingSums:
        """Start the sums over the local shards and the all_reduce over the ranks.

        Args:
            plan: The step's.
            names: Which sums.
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
            captures, names, state.tuner_state.parts[0], scales=len(state.tuner_state.parts),
            lrs=lrs, place=place, late=late, exact=exact,
        )  # fmt: skip
        device = state.communication_device
        return PendingSums(sums, names, shape, state.layout.group, device, lr_by_rank=place is not None)

    def decide(self, plan: Plan, pending: PendingSums) -> tuple[Proposal, Reading] | None:
        """The tuner's proposal, and its numbers on the host: the step's one host sync. ``None``: leave the step out."""
        state, tuner = self._state, self._state.tuner
        proposal = tuner.propose(state.tensor, pending.wait())
        reading = Reading.of(proposal)
        if not reading.fits_float32:
            sums = self.start(plan, tuner.sums, exact=True).wait()
            proposal = tuner.propose(state.tensor, sums)
            reading = Reading.of(proposal)
        return None if not reading.is_finite and self._is_skipped(plan, reading) else (proposal, reading)

    def refine(self, plan: Plan, proposal: Proposal, reading: Reading | None) -> tuple[Proposal, Reading | None]:
        """The proposal once late sums are known, if the tuner needs any; and its numbers, if they are known still."""
        state, tuner = self._state, self._state.tuner
        late = tuner.late(all(state.has_scale))
        if late and tuner.late_until_scale and state.is_per_group:
            # A frozen group would ask for a second all_reduce in every step. All ranks have the same numbers.
            reading = reading or Reading.of(proposal)
            if not any(reading.moves(column) for column, has in enumerate(state.has_scale) if not has):
                return proposal, reading
        if not late:
            return proposal, reading
        sums = self.start(plan, late, late=True, exact=tuner.late_until_scale).wait()
        return tuner.refine(state.tensor, proposal, sums), None

    def _is_skipped(self, plan: Plan, reading: Reading) -> bool:
        """Whether a step whose sums are not finite is left out; otherwise it is an error."""

        def position_is_finite() -> bool:
            if reading.position_is_finite is not None:
                return reading.position_is_finite
            sums = self.start(plan, ("delta_square", "x_square"), exact=True).wait()
            return bool(torch.stack(list(sums.values())).isfinite().all())

        def account() -> str:
            return account_of_nonfinite(plan.shards, self._state.groups, self._state.layout.group)

        number = int(self._state.tuner_state.updates) + 1
        return self._guard.skips(reading.sums.get("lr", ()), number, position_is_finite, account)
