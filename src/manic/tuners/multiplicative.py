"""manic's own tuner: the scale is on updates, and is moved by factors.

The rules of a tuner are tuner.py's; see there for what it does not know. docs/variants.md has the formulas, and
docs/tuning.md how they were found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from manic.tuners.base import BETAS, M, R, S, Sums, Tuner, V

__all__ = ["LOOK_EVERY", "Fall", "Multiplying"]

# Its own rows: the largest learning rate so far, the largest S times learning rate since x_ref, the number of steps
# since the learning rate was last larger than ever (1 in that step), whether it has come down since, and a second v.
LARGEST_LR, PEAK, AGE, CAME_DOWN, V_SIZED = range(8, 13)

# The largest change of log S in a step when gradients do not agree from step to step.
_RATE = 0.1
# How much more it may be when they do, and how long agreement is remembered.
_AGREED, _MEMORY = 2.0, 0.9
# The age from which on S slows down.
_SETTLED = 100
# The age from which on a learning rate that has not come down is taken for one that will not.
_CONSTANT = 40
# By how much, as a share, learning rates differ that differ by more than rounding.
_DIFFERS = 1e-9
# How much a new largest learning rate may let an update grow: a warm-up may begin at next to nothing.
_SURGE = 4.0
# How far S may fall below its largest before the way begins anew, and in which steps that is looked at.
_FALL, LOOK_EVERY = 4.0, 10
# x goes back then if the learning rate has come down, to no less than this share of its largest, up to this step.
_BEGUN, _EARLY = 0.97, 1000


class Fall(NamedTuple):
    """What follows from how far S has fallen; both are 0-dim tensors."""

    begins_anew: Tensor
    """1 where the way should, 0 where not."""
    kept: Tensor
    """The share of the way so far, x - x_ref, that x should keep then, in (0, 1]."""


class Multiplying(Tuner):
    """The tuner of ``"multiplicative"``; arguments are those of :class:`manic.tuners.base.Tuner`."""

    @property
    def position(self) -> tuple[Tensor, float]:
        """1 and 0: S is in Delta."""
        return torch.ones_like(self.state[S, 0]), 0.0

    def has_gained(self) -> bool:
        """Whether there is a scale. The host waits for the device."""
        return bool(self.state[S].sum() > 0)

    def start(self, update_square: Tensor, x_square: Tensor) -> Tensor:
        """Set the scale, from the length of the first update that has one.

        Args:
            update_square: |u|^2; where it is 0, the scale stays unset, which is 0.
            x_square: |x|^2; where it is 0, as if it were 1.

        Returns:
            S: 0-dim.
        """
        length = torch.where(x_square > 0, x_square.sqrt(), 1.0)
        scale = torch.where(update_square > 0, self.s_init * length / update_square.sqrt(), 0.0)
        scale = torch.where(scale.isfinite(), scale, 0.0)
        if self.s_max is not None:
            scale = scale.clamp(max=self.s_max)
        self.state[S].copy_((scale / len(self.betas)).expand(len(self.betas)))
        return self.scale

    @property
    def has_fallen(self) -> Tensor:
        """Whether :meth:`look_back` would let the way begin anew: 0-dim, 0 or 1. Only in every tenth step it may."""
        fallen = (_FALL * self._within_reach < self.state[PEAK, 0]) & (self.updates % LOOK_EVERY == 0)
        return fallen.to(self.state.dtype)

    def look_back(self) -> Fall:
        """Ask, after an update, whether S has fallen so far that the way should begin anew; then forget its largest.

        x may have come too far by a scale that was too large, and be unable to come back by the small one that is
        learned from that. S is compared at the largest learning rate with what it came to at the one that there was: in
        a warm-up it falls as that grows. Where the learning rate has just begun to come down, which says that the run
        is young, the way is made as long as it had been with the S of now. Later too much would be lost.

        No host synchronisation takes place.
        """
        begins_anew, within_reach, peak = self.has_fallen, self._within_reach, self.state[PEAK]
        fallen = begins_anew > 0
        has_begun = self.sums.lr > _BEGUN * self.state[LARGEST_LR, 0]
        is_early = (self.state[CAME_DOWN, 0] > 0) & has_begun & (self.updates <= _EARLY)
        kept = torch.where(fallen & is_early, within_reach / peak[0], 1.0)
        self.state[PEAK].copy_(torch.where(fallen, within_reach, peak))
        return Fall(begins_anew, kept)

    def rebased(self) -> None:
        """Be told that x_ref is now where x is."""
        self.state[PEAK].fill_(self._within_reach)

    @property
    def _within_reach(self) -> Tensor:
        return self.state[S].sum() * self.state[LARGEST_LR, 0]

    def _learn(self, sums: Sums) -> tuple[Tensor, Mapping[int, Tensor]]:
        """h, and the new rows: r, m and v are other things here.

        ``h`` is the cosine of the way so far, x - x_ref, and the gradient. Below 0 it says that a longer way would have
        been better. Over its root mean square (v, whose weights add up to m) it says how sure that is; where that
        agrees from step to step (r), as it does while S is far too small, S moves faster. All of it is weighed by the
        learning rate over its largest so far: where a schedule lets training settle, S does too. And the longer ago
        that largest was, the slower S moves: log S by no more in the second half of a run than in its first.

        A cosine is deaf to noise: of many small gradients and few large ones the many are heard. That is right while
        the noise will be cooled out by a learning rate that comes down. Where it has not come down for a while, the
        noise stays, and gradients are heard by their size.
        """
        r, m, v, s, beta, v_sized = (self.state[row] for row in (R, M, V, S, BETAS, V_SIZED))
        schedule = self._follow(sums.lr)
        is_constant = (schedule[AGE] > _CONSTANT) & (schedule[CAME_DOWN] == 0)

        is_known = sums.delta_dot.sqrt() * sums.grad_square.sqrt() > 0
        sized = torch.where(is_known, sums.delta_grad / sums.delta_dot.sqrt(), 0.0)
        h = torch.where(is_known, sized / sums.grad_square.sqrt(), 0.0).clamp(-1.0, 1.0)
        m = torch.where(is_known, beta * m + (1.0 - beta), m)
        v = torch.where(is_known, beta * v + (1.0 - beta) * h * h, v)
        v_sized = torch.where(is_known, beta * v_sized + (1.0 - beta) * sized * sized, v_sized)
        z = _over_root(h, v / m).clamp(-1.0, 1.0)
        r = torch.where(is_known, _MEMORY * r + (1.0 - _MEMORY) * z, r)  # no single gradient sways that
        z = torch.where(is_constant, _over_root(sized, v_sized / m).clamp(-1.0, 1.0), z)

        sure, agreed = z.mean(), r.mean()
        weight = torch.where(sums.lr > 0, sums.lr / schedule[LARGEST_LR][0], 0.0)
        rate = _RATE * (_SETTLED / schedule[AGE][0]).clamp(max=1.0) * weight * (1.0 + _AGREED * agreed * agreed)
        s = self._bounded(s * self._surge(sums.lr) * torch.exp(-rate * sure))
        peak = torch.maximum(self.state[PEAK], s.sum() * sums.lr)
        return h, {R: r, M: m, V: v, S: s, V_SIZED: v_sized, PEAK: peak, **schedule}

    def _follow(self, lr: Tensor) -> dict[int, Tensor]:
        """The rows that tell where in its schedule the learning rate is."""
        largest = self.state[LARGEST_LR]
        is_new = lr > (1.0 + _DIFFERS) * largest
        came_down = torch.where(lr < (1.0 - _DIFFERS) * largest, 1.0, self.state[CAME_DOWN])
        return {
            LARGEST_LR: torch.maximum(largest, lr),
            AGE: torch.where(is_new, 0.0, self.state[AGE]) + 1.0,
            CAME_DOWN: torch.where(is_new, 0.0, came_down),
        }

    def _surge(self, lr: Tensor) -> Tensor:
        """What S is multiplied by where the learning rate is far above all before it; 1 elsewhere."""
        bound = _SURGE * self.state[LARGEST_LR, 0]
        return torch.where((bound > 0) & (lr > bound), bound / lr, 1.0)


def _over_root(value: Tensor, mean_square: Tensor) -> Tensor:
    return torch.where(mean_square > 0, value / mean_square.sqrt(), 0.0)
