"""Mechanic's tuner: Algorithm 1, lines 8 to 14, in which each beta's wealth is bet on the next step.

The two published implementations are the two classes below; docs/variants.md has their differences. What a tuner may
not know is in base.py; mechanic_reference.py has the same rules in plain float64.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from manic.tuners.base import Learned, Sums, Tuner, checked, checked_betas

__all__ = ["MechanicOptax", "MechanicPyTorch"]

BETAS = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)
"""The paper's decay factors."""


class _Mechanic(Tuner):
    """What both implementations share.

    Args:
        betas: Decay factors, each in (0, 1): a column of the state for each. Default: the paper's six.
        s_init: Initial scale, positive. Default: 1e-6 (``"optax"``) or 1e-8 (``"pytorch"``).
        s_decay: lambda of the paper, the strength of the pull towards the origin; not negative.
        eps: Added to denominators; positive.
        s_max: The largest scale, at least ``s_init``. Default: no bound.

    Raises:
        ValueError: if an argument is out of its range.
    """

    scales = "displacement"
    fields = ("r", "m", "v", "s", "betas")
    fixed = ("betas",)
    default_s_init: ClassVar[float]

    def __init__(
        self,
        betas: Sequence[float] = BETAS,
        s_init: float | None = None,
        s_decay: float = 0.01,
        eps: float = 1e-8,
        s_max: float | None = None,
    ) -> None:
        self.betas = checked_betas(betas)
        self.s_init = checked("s_init", self.default_s_init if s_init is None else s_init, 0.0)
        self.s_decay = checked("s_decay", s_decay, 0.0, strictly=False)
        self.eps = checked("eps", eps, 0.0)
        super().__init__(s_max)

    @property
    def smallest_bound(self) -> float:
        """The first scale."""
        return self.s_init

    @property
    def columns(self) -> int:
        """One for each beta."""
        return len(self.betas)

    def has_left_start(self, state: Mapping[str, Tensor]) -> bool:
        """Whether any beta has earned more than its initial stake. The host waits for the device."""
        return bool((state["r"] > self._stake(state["m"])).any())

    def learn(self, state: Mapping[str, Tensor], sums: Sums) -> Learned:
        """Lines 8 to 14 of Algorithm 1."""
        m, v, s, beta = state["m"], state["v"], state["s"], state["betas"]
        pull = self.s_decay * s.sum() * sums["grad_square"].sqrt() / (sums["x_square"].sqrt() + self.eps)
        h = sums["delta_grad"] + pull * sums["delta_x"]

        new_m, r = self._reward(h, m, state["r"], s, beta)
        v = beta * beta * v + h * h
        wealth = self._stake(new_m) + r.clamp(min=0.0)
        s = wealth / (v.sqrt() + self.eps)
        return Learned({"r": r, "m": new_m, "v": v, "s": self._bounded(s)}, h)

    @abstractmethod
    def _reward(self, h: Tensor, m: Tensor, r: Tensor, s: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """The new m and r."""

    def _stake(self, m: Tensor) -> Tensor:
        return self.s_init / len(self.betas) * m


class MechanicOptax(_Mechanic):
    """What the paper's experiments ran: ``optax.contrib.mechanize``.

    The reward takes h clamped to [-m, m], and r is stored as it is.
    """

    name = "optax"
    default_s_init = 1e-6
    sums = ("delta_grad", "grad_square", "delta_x", "x_square")

    def initial(self) -> Mapping[str, float | Sequence[float]]:
        """Every s is ``s_init``, within ``s_max``."""
        start = self.s_init if self.s_max is None else min(self.s_init, self.s_max / len(self.betas))
        return {"s": start, "betas": self.betas}

    def _reward(self, h: Tensor, m: Tensor, r: Tensor, s: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        return torch.maximum(beta * m, h.abs() + self.eps), beta * r - torch.clamp(h, min=-m, max=m) * s


class MechanicPyTorch(_Mechanic):
    """The authors' package ``mechanic-pytorch`` 0.0.1.

    s starts at 0 and m at 1e-6; the reward takes h as it is, and r is stored clamped at 0; the lambda term reads x as
    the base optimizer left it; a parameter without a gradient is left out.
    """

    name = "pytorch"
    default_s_init = 1e-8
    sums = ("delta_grad", "grad_square")
    late_sums = ("delta_x", "x_square")
    moves_without_gradient = False

    def initial(self) -> Mapping[str, float | Sequence[float]]:
        """Every m is 1e-6."""
        return {"m": 1e-6, "betas": self.betas}

    def learn(self, state: Mapping[str, Tensor], sums: Sums) -> Learned:
        """Algorithm 1, once the late sums are there; nothing before."""
        if "delta_x" not in sums:
            return Learned({}, torch.full_like(sums["delta_grad"], math.nan))
        return super().learn(state, sums)

    def scale(self, state: Mapping[str, Tensor]) -> Tensor:
        """S, at least 0: 0-dim, a new tensor."""
        return super().scale(state).clamp(min=0.0)

    def _reward(self, h: Tensor, m: Tensor, r: Tensor, s: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        return torch.maximum(beta * m, h.abs()), (beta * r - h * s).clamp(min=0.0)
