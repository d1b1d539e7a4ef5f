"""Mechanic's tuner: Algorithm 1, lines 8 to 14, in which each beta's wealth is bet on the next step.

The rules of a tuner are tuner.py's; see there for what it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from manic.tuners.base import BETAS, M, R, S, Sums, Tuner, V

__all__ = ["Betting"]


class Betting(Tuner):
    """The tuner of both published implementations; arguments are those of :class:`manic.tuners.base.Tuner`."""

    def reset(self) -> None:
        """Go back to the start, in place."""
        super().reset()
        self.state[M].fill_(self.variant.m_start)
        if self.variant.s_starts_at_init:
            start = self.s_init if self.s_max is None else min(self.s_init, self.s_max / len(self.betas))
            self.state[S].fill_(start)

    @property
    def position(self) -> tuple[Tensor, float]:
        """S, and eps."""
        return self.state[S].sum(), self.eps

    def has_gained(self) -> bool:
        """Whether moving has paid more than the stake of the start, for any beta. The host waits for the device."""
        return bool((self.state[R] > self.s_init / len(self.betas) * self.state[M]).any())

    def _learn(self, sums: Sums) -> tuple[Tensor, Mapping[int, Tensor]]:
        r, m, v, s, beta = (self.state[row] for row in (R, M, V, S, BETAS))

        decay = self.s_decay * s.sum() * sums.grad_square.sqrt() / (sums.x_square.sqrt() + self.eps)
        h = sums.delta_grad + decay * sums.delta_dot

        if self.variant.clips_h:
            rewarded = torch.clamp(h, min=-m, max=m)
            m = torch.maximum(beta * m, h.abs() + self.eps)
        else:
            rewarded = h
            m = torch.maximum(beta * m, h.abs())
        v = beta * beta * v + h * h
        r = beta * r - rewarded * s
        if not self.variant.keeps_negative_reward:
            r = r.clamp(min=0.0)
        wealth = self.s_init / len(self.betas) * m + r.clamp(min=0.0)
        s = wealth / (v.sqrt() + self.eps)
        return h, {R: r, M: m, V: v, S: self._bounded(s)}
