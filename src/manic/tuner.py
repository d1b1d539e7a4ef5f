"""The tuners: r, m, v, s and how they turn one step's sums into the next scale S.

Mechanic's bets on S, and manic's own multiplies it. They know four numbers a step and nothing of where they come from:
no parameter, no process group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LOOK_EVERY", "VARIANTS", "Sums", "Tuner", "Variant"]


# Squares this small may have lost elements to underflow, where they were summed in float32: an element under 1e-19 has
# a square that is none, and 1e10 of them would not come to this.
_SMALLEST_SQUARE = 1e-20


class Sums(NamedTuple):
    """The four inner products of a step, each over every element of the model once, and the learning rate.

    All are 0-dim tensors of the tuner's dtype and device.
    """

    delta_grad: Tensor
    """<Delta_t, g_t>"""
    grad_square: Tensor
    """|g_t|^2"""
    delta_dot: Tensor
    """<Delta_t, x_t>, or |Delta_t|^2 where the variant multiplies."""
    x_square: Tensor
    """|x_t|^2"""
    lr: Tensor
    """The base optimizers' largest, the mean over the ranks; 1 unless the variant multiplies."""

    def read(self) -> Reading:
        """The sums as numbers. The host waits for the device."""
        return Reading(*torch.stack(self).tolist())


class Reading(NamedTuple):
    """:class:`Sums` on the host."""

    delta_grad: float
    grad_square: float
    delta_dot: float
    x_square: float
    lr: float

    @property
    def is_finite(self) -> bool:
        """Whether all are."""
        return all(math.isfinite(value) for value in self)

    def is_in_range(self, with_position: bool) -> bool:
        """Whether float32 can have held what was summed: nothing too large for its squares, and nothing too small."""
        squares = (self.grad_square, self.x_square) if with_position else (self.grad_square,)
        return self.is_finite and min(squares) >= _SMALLEST_SQUARE


@dataclass(frozen=True)
class Variant:
    """Where two published implementations of Mechanic differ, and what is manic's own (docs/variants.md)."""

    name: str
    s_init: float
    """Default of ``s_init``."""
    betas: tuple[float, ...]
    """Default of ``betas``."""
    s_starts_at_init: bool
    """``s_1`` is ``s_init`` for every beta; otherwise 0."""
    m_start: float
    clips_h: bool
    """The reward takes ``h`` clamped to [-m, m] with the previous ``m``, and ``m`` takes ``|h| + eps``."""
    keeps_negative_reward: bool
    """``r`` is stored as it is and clamped at 0 only in the wealth; otherwise it is stored clamped."""
    x_after_base_step: bool
    """The lambda term reads ``x`` where the base optimizer left it; otherwise where the gradient was taken."""
    moves_without_gradient: bool
    """A parameter without a gradient counts as gradient 0 and follows S; otherwise it is left out and stays."""
    multiplies: bool = False
    """S is moved by factors, and is what every update is scaled by when it is made; otherwise Delta is the sum of bare
    updates, and S scales that."""
    rows: int = 8
    """Of its state."""


_BETAS = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)
VARIANTS = {
    "optax": Variant("optax", 1e-6, _BETAS, True, 0.0, True, True, False, True),
    "pytorch": Variant("pytorch", 1e-8, _BETAS, False, 1e-6, False, False, True, False),
    "multiplicative": Variant("multiplicative", 1e-4, (0.99,), False, 0.0, False, False, False, True, True, 12),
}

# Of the variant that multiplies (docs/tuning.md says how they were found). The largest change of log S in a step when
# gradients do not agree from step to step, how much more it may be when they do, and how long agreement is remembered.
_RATE, _AGREED, _MEMORY = 0.1, 2.0, 0.9
# Steps since the learning rate was last larger than ever: from when on S slows down, and from when on a learning rate
# that has not come down since is taken for one that will not. Then how much larger or smaller is no rounding.
_SETTLED, _CONSTANT, _DIFFERS = 100, 40, 1e-6
# How far S may fall below its largest before the way is measured from where it is by then, how often that is looked at,
# and how much a new largest learning rate may let an update grow: a warm-up may begin at next to nothing.
_FALL, LOOK_EVERY, _SURGE = 4.0, 10, 4.0


class Tuner:
    """The state of Algorithm 1 that is not a parameter, and its update.

    Args:
        betas: Decay factors, each in (0, 1). One (r, m, v, s) is kept for each. ``None``: the variant's.
        s_init: Initial scale, positive; of a variant that multiplies, the length of the first step over |x_1|.
            ``None``: the variant's default.
        s_decay: lambda of the paper, the strength of the pull towards the origin.
        eps: Added to denominators.
        variant: A name in :data:`VARIANTS`.
        s_max: The largest scale, positive. ``None``: no bound.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        betas: Sequence[float] | None = None,
        s_init: float | None = None,
        s_decay: float = 0.01,
        eps: float = 1e-8,
        variant: str = "optax",
        s_max: float | None = None,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {sorted(VARIANTS)}, got {variant!r}")
        self.variant = VARIANTS[variant]
        s_init = self.variant.s_init if s_init is None else float(s_init)
        betas = tuple(float(beta) for beta in (self.variant.betas if betas is None else betas))
        if not betas or not all(0.0 < beta < 1.0 for beta in betas):
            raise ValueError(f"betas must be one or more numbers strictly between 0 and 1, got {betas}")
        if not (s_init > 0.0 and math.isfinite(s_init)):
            raise ValueError(f"s_init must be positive and finite, got {s_init}")
        if not (s_decay >= 0.0 and math.isfinite(s_decay)):
            raise ValueError(f"s_decay must be non-negative and finite, got {s_decay}")
        if not (eps > 0.0 and math.isfinite(eps)):
            raise ValueError(f"eps must be positive and finite, got {eps}")
        self.s_max = None if s_max is None else float(s_max)
        smallest = 0.0 if self.variant.multiplies else s_init
        if self.s_max is not None and not (self.s_max >= smallest and self.s_max > 0.0 and math.isfinite(self.s_max)):
            raise ValueError(f"s_max must be positive, finite and at least {smallest}; got {s_max}")
        self.betas, self.s_init, self.s_decay, self.eps = betas, s_init, float(s_decay), float(eps)
        # One tensor, so that a checkpoint holds the tuner whole or not at all. Rows r, m, v, s, the number of updates
        # made, what a saved one must agree in, the betas and the variant, the number of steps whose sums were not
        # finite; of a variant that multiplies also the largest learning rate so far, the largest S times learning rate
        # since x_ref, the number of steps since the learning rate was last larger than ever, and a second v. A column
        # for each beta.
        self.state = torch.zeros(self.variant.rows, len(betas), dtype=torch.float64)
        # The last step's h and sums, for whoever watches; nan before the first step.
        self.h = torch.full((), math.nan, dtype=torch.float64)
        self.sums = Sums(self.h, self.h, self.h, self.h, self.h)
        self.reset()

    def reset(self) -> None:
        """Go back to the start, in place."""
        self.state.zero_()
        self.state[1].fill_(self.variant.m_start)
        if self.variant.s_starts_at_init:
            start = self.s_init if self.s_max is None else min(self.s_init, self.s_max / len(self.betas))
            self.state[3].fill_(start)
        self.state[5].copy_(torch.tensor(self.betas, dtype=torch.float64))
        self.state[6].fill_(list(VARIANTS).index(self.variant.name))

    def to(self, device: torch.device) -> None:
        """Move to ``device``, in float64, or in float32 where the device has no float64."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.state = self.state.to(device, dtype)
        self.h = self.h.to(device, dtype)
        self.sums = Sums(*(value.to(device, dtype) for value in self.sums))

    def check(self, state: Tensor) -> None:
        """Raise unless ``state`` was saved by a tuner like this one.

        Raises:
            ValueError: if it was saved with other betas or another variant.
        """
        state = self._with_all_rows(state)
        names = list(VARIANTS)
        if state.ndim == 2 and state.shape[0] > 6 and int(state[6, 0]) != names.index(self.variant.name):
            saved_name = dict(enumerate(names)).get(int(state[6, 0]), "unknown to this version")
            raise ValueError(f"the saved tuner is of variant {saved_name}, this one {self.variant.name}; pass the same")
        # Compared with the arguments, since the state itself may be what was just loaded into.
        fits = state.shape == self.state.shape and all(
            math.isclose(a, b, rel_tol=1e-7) for a, b in zip(state[5].tolist(), self.betas)
        )
        if not fits:
            saved = state[5].tolist() if state.ndim == 2 and state.shape[0] > 5 else f"shape {tuple(state.shape)}"
            raise ValueError(f"the saved tuner has other betas: {saved} there, {list(self.betas)} here; pass the same")

    def _with_all_rows(self, state: Tensor) -> Tensor:
        """A saved state with the rows that this version has: the eighth was added later, and counts from 0."""
        known = state.shape[:1] == (7,) and not self.variant.multiplies
        return torch.cat((state, state.new_zeros(1, state.shape[1]))) if known else state

    def load(self, state: Tensor) -> None:
        """Copy a saved :attr:`state` into this one, in place.

        Raises:
            ValueError: as :meth:`check` does.
        """
        self.check(state)
        self.state.copy_(self._with_all_rows(state))

    @property
    def updates(self) -> Tensor:
        """Number of steps taken, those included from which nothing was learned: 0-dim."""
        return self.state[4, 0]

    @property
    def nonfinite(self) -> Tensor:
        """Number of steps that were left out, or not learned from, because their sums were not finite: 0-dim."""
        return self.state[7, 0]

    def skip(self) -> None:
        """Count a step that is not taken because its sums are not finite."""
        self.state[7].add_(1)

    def has_gained(self) -> bool:
        """Whether moving has paid more than the stake of the start, for any beta. The host waits for the device."""
        r, m, _, s, *_ = self.state.unbind()
        if self.variant.multiplies:
            return bool(s.sum() > 0)
        return bool((r > self.s_init / len(self.betas) * m).any())

    @property
    def position(self) -> tuple[Tensor, float]:
        """The factor f in x = x_ref + f * Delta, 0-dim, and what is added to it where Delta is recomputed from x."""
        if self.variant.multiplies:  # S is in Delta
            return torch.ones_like(self.state[3, 0]), 0.0
        return self.state[3].sum(), self.eps

    def start(self, update_square: Tensor, x_square: Tensor) -> Tensor:
        """Set the scale of a variant that multiplies, from the length of the first update that has one.

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
        self.state[3].copy_((scale / len(self.betas)).expand(len(self.betas)))
        return self.scale

    def restart(self) -> Tensor:
        """Whether S has fallen so far, of a variant that multiplies, that x_ref should be where x is: 0-dim, 0 or 1.

        x may have come too far by a scale that was too large, and be unable to come back by the small one that is
        learned from that. Where it is 1, the largest S is forgotten. It is 0 but in every tenth step.
        """
        within_reach, peak = self.state[3].sum() * self.state[8, 0], self.state[9]
        fallen = (_FALL * within_reach < peak[0]) & (self.updates % LOOK_EVERY == 0)
        self.state[9].copy_(torch.where(fallen, within_reach, peak))
        return fallen.to(self.state.dtype)

    def forget_largest(self) -> None:
        """Of a variant that multiplies: x_ref is where x is, and the largest S since then what S is."""
        if self.variant.multiplies:
            self.state[9].fill_(self.state[3].sum() * self.state[8, 0])

    @property
    def scale(self) -> Tensor:
        """S, the factor on Delta, or on updates where the variant multiplies: 0-dim, a new tensor."""
        scale = self.state[3].sum()
        return scale if self.variant.keeps_negative_reward else scale.clamp(min=0.0)

    def update(self, sums: Sums) -> Tensor:
        """Take one step of Algorithm 1 (lines 8 to 14), or of manic's own tuner, and return the new S.

        From sums that are not finite, or that lead to what is not, nothing is learned: they are counted.

        Args:
            sums: The step's inner products over the whole model.

        Returns:
            S_{t+1}: 0-dim. No host synchronisation takes place.
        """
        r, m, v, s, updates, beta, variant, nonfinite, *own = self.state.unbind()
        unchanged = torch.stack((r, m, v, s, updates + 1, beta, variant, nonfinite + 1, *own))
        h, (r, m, v, s, *own) = self._multiply(sums) if self.variant.multiplies else self._bet(sums)
        if self.s_max is not None:
            s = s * (self.s_max / s.sum()).clamp(max=1.0)
        if self.variant.multiplies:
            own[1] = torch.maximum(own[1], s.sum() * sums.lr)
        new = torch.stack((r, m, v, s, updates + 1, beta, variant, nonfinite, *own))
        # A divisor that is infinite would not show in h.
        finite = new.isfinite().all() & torch.stack(sums).isfinite().all()
        self.state.copy_(torch.where(finite, new, unchanged))
        self.h, self.sums = h, sums
        return self.scale

    def _bet(self, sums: Sums) -> tuple[Tensor, _Learned]:
        """Mechanic's: h, and the new r, m, v and s."""
        r, m, v, s, _, beta, *_ = self.state.unbind()

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
        return h, (r, m, v, wealth / (v.sqrt() + self.eps))

    def _multiply(self, sums: Sums) -> tuple[Tensor, _Learned]:
        """manic's own: h, and the new r, m, v and s, which are other things here, and its own rows.

        ``h`` is the cosine of the way so far, x - x_ref, and the gradient. Below 0 it says that a longer way would have
        been better. Over its root mean square (v, whose weights add up to m) it says how sure that is; where that
        agrees from step to step (r), as it does while S is far too small, S moves faster. All of it is weighed by the
        learning rate over its largest so far: where a schedule lets training settle, S does too. And the longer ago
        that largest was, the slower S moves: log S by no more in the second half of a run than in its first.

        A cosine is deaf to noise: of many small gradients and few large ones the many are heard. That is right while
        the noise will be cooled out by a learning rate that comes down. Where it has not come down for a while, the
        noise stays, and gradients are heard by their size.
        """
        r, m, v, s, _, beta, _, _, largest_lr, peak, age, v_sized = self.state.unbind()
        largest = largest_lr[0]
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
        s = s * surge * torch.exp(-rate * sure)
        return h, (r, m, v, s, torch.maximum(largest_lr, sums.lr), peak, age, v_sized)


def _over_root(value: Tensor, mean_square: Tensor) -> Tensor:
    return torch.where(mean_square > 0, value / mean_square.sqrt(), 0.0)


_Learned = tuple[Tensor, ...]
