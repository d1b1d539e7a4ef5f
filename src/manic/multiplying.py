"""manic's own tuner: the scale is on updates, and is moved by factors.

The rules of a tuner are tuner.py's; see there for what it does not know. docs/variants.md has the formulas, and
docs/tuning.md how they were found.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from manic.tuner import BETAS, M, R, S, Sums, Tuner, V

__all__ = ["LOOK_EVERY", "Multiplying"]

# Its own rows: the largest learning rate so far, the largest S times learning rate since x_ref, the number of steps
# since the learning rate was last larger than ever, and a second v.
LARGEST_LR, PEAK, AGE, V_SIZED = range(8, 12)

# The largest change of log S in a step when gradients do not agree from step to step, how much more it may be when they
# do, and how long agreement is remembered.
_RATE, _AGREED, _MEMORY = 0.1, 2.0, 0.9
# Steps since the learning rate was last larger than ever: from when on S slows down, and from when on a learning rate
# that has not come down since is taken for one that will not. Then how much larger or smaller is no rounding.
_SETTLED, _CONSTANT, _DIFFERS = 100, 40, 1e-6
# How far S may fall below its largest before the way begins anew, and how often that is looked at. Then x goes back, as
# long as the learning rate has come down, but not below this share of its largest, and up to this step.
_FALL, LOOK_EVERY, _BEGUN, _EARLY = 4.0, 10, 0.97, 1000
# How much a new largest learning rate may let an update grow: a warm-up may begin at next to nothing.
_SURGE = 4.0


class Multiplying(Tuner):
    """The tuner of ``"multiplicative"``; arguments are those of :class:`manic.tuner.Tuner`."""

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

    def restart(self) -> tuple[Tensor, Tensor]:
        """Whether S has fallen so far that the way should begin anew, and how much of it should be kept.

        x may have come too far by a scale that was too large, and be unable to come back by the small one that is
        learned from that. S is compared at the largest learning rate with what it came to at the one that there was: in
        a warm-up it falls as that grows. Where the learning rate has just begun to come down, which says that the run
        is young, the way is made as long as it had been with the S of now. Later too much would be lost.

        Returns:
            0-dim: 1 where it should, and the largest S is forgotten, or 0, as in all but every tenth step; and the
            share of x - x_ref that should be kept, in (0, 1].
        """
        within_reach, peak = self._within_reach, self.state[PEAK]
        fallen = (_FALL * within_reach < peak[0]) & (self.updates % LOOK_EVERY == 0)
        share = self.sums.lr / self.state[LARGEST_LR, 0]
        is_early = (share > _BEGUN) & (share < 1.0 - _DIFFERS) & (self.updates <= _EARLY)
        kept = torch.where(fallen & is_early, within_reach / peak[0], 1.0)
        self.state[PEAK].copy_(torch.where(fallen, within_reach, peak))
        return fallen.to(self.state.dtype), kept

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
        r, m, v, s, beta, age, v_sized = (self.state[row] for row in (R, M, V, S, BETAS, AGE, V_SIZED))
        largest = self.state[LARGEST_LR, 0]
        weight = torch.where(sums.lr > 0, sums.lr / torch.maximum(largest, sums.lr), 0.0)
        surges = (largest > 0) & (sums.lr > _SURGE * largest)
        surge = torch.where(surges, _SURGE * largest / sums.lr, 1.0)
        age = torch.where(sums.lr > (1.0 + _DIFFERS) * largest, 0.0, age) + 1.0
        is_constant = (age > _CONSTANT) & (sums.lr >= (1.0 - _DIFFERS) * largest)

        is_known = sums.delta_dot.sqrt() * sums.grad_square.sqrt() > 0
        sized = torch.where(is_known, sums.delta_grad / sums.delta_dot.sqrt(), 0.0)
        h = torch.where(is_known, sized / sums.grad_square.sqrt(), 0.0).clamp(-1.0, 1.0)
        m = torch.where(is_known, beta * m + (1.0 - beta), m)
        v = torch.where(is_known, beta * v + (1.0 - beta) * h * h, v)
        v_sized = torch.where(is_known, beta * v_sized + (1.0 - beta) * sized * sized, v_sized)
        z = _over_root(h, v / m).clamp(-1.0, 1.0)
        r = torch.where(is_known, _MEMORY * r + (1.0 - _MEMORY) * z, r)
        z = torch.where(is_constant, _over_root(sized, v_sized / m).clamp(-1.0, 1.0), z)
        sure, agreed = z.mean(), r.mean()
        rate = _RATE * (_SETTLED / age[0]).clamp(max=1.0) * weight * (1.0 + _AGREED * agreed * agreed)
        s = self._bounded(s * surge * torch.exp(-rate * sure))
        return h, {
            R: r,
            M: m,
            V: v,
            S: s,
            LARGEST_LR: torch.maximum(self.state[LARGEST_LR], sums.lr),
            PEAK: torch.maximum(self.state[PEAK], s.sum() * sums.lr),
            AGE: age,
            V_SIZED: v_sized,
        }


def _over_root(value: Tensor, mean_square: Tensor) -> Tensor:
    return torch.where(mean_square > 0, value / mean_square.sqrt(), 0.0)
