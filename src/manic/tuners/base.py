"""What a tuner is: a step's sums in, the scale S out, and between steps one small tensor.

How it learns is betting.py's and multiplying.py's. It knows a few numbers a step and nothing of where they come from:
no parameter, no process group.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "BETAS", "NONFINITE", "UPDATES", "VARIANT", "VARIANTS", "Held", "M", "R", "Reading", "S", "Sums", "Tuner", "V",
    "Variant",
]  # fmt: skip

# The rows of a tuner's state: what Algorithm 1 calls r, m, v and s; the number of updates made; what a saved one must
# agree in, the betas and the variant; the number of steps whose sums were not finite. A tuner may add rows of its own.
R, M, V, S, UPDATES, BETAS, VARIANT, NONFINITE = range(8)

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
    """Of its tuner's state."""


_BETAS = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)
VARIANTS = {
    "optax": Variant("optax", 1e-6, _BETAS, True, 0.0, True, True, False, True),
    "pytorch": Variant("pytorch", 1e-8, _BETAS, False, 1e-6, False, False, True, False),
    "multiplicative": Variant("multiplicative", 1e-4, (0.99,), False, 0.0, False, False, False, True, True, 13),
}


class Held(NamedTuple):
    """A tuner as it was."""

    state: Tensor
    h: Tensor
    sums: Sums


class Tuner(ABC):
    """The state of Algorithm 1 that is not a parameter, and its update.

    Args:
        variant: The variant whose tuner it is.
        betas: Decay factors, each in (0, 1). One column of the state is kept for each. ``None``: the variant's.
        s_init: Initial scale, positive; of a variant that multiplies, the length of the first step over |x_1|.
            ``None``: the variant's default.
        s_decay: lambda of the paper, the strength of the pull towards the origin.
        eps: Added to denominators.
        s_max: The largest scale, positive. ``None``: no bound.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        variant: Variant,
        betas: Sequence[float] | None = None,
        s_init: float | None = None,
        s_decay: float = 0.01,
        eps: float = 1e-8,
        s_max: float | None = None,
    ) -> None:
        self.variant = variant
        s_init = variant.s_init if s_init is None else float(s_init)
        betas = tuple(float(beta) for beta in (variant.betas if betas is None else betas))
        if not betas or not all(0.0 < beta < 1.0 for beta in betas):
            raise ValueError(f"betas must be one or more numbers strictly between 0 and 1, got {betas}")
        if not (s_init > 0.0 and math.isfinite(s_init)):
            raise ValueError(f"s_init must be positive and finite, got {s_init}")
        if not (s_decay >= 0.0 and math.isfinite(s_decay)):
            raise ValueError(f"s_decay must be non-negative and finite, got {s_decay}")
        if not (eps > 0.0 and math.isfinite(eps)):
            raise ValueError(f"eps must be positive and finite, got {eps}")
        self.s_max = None if s_max is None else float(s_max)
        smallest = 0.0 if variant.multiplies else s_init
        if self.s_max is not None and not (self.s_max >= smallest and self.s_max > 0.0 and math.isfinite(self.s_max)):
            raise ValueError(f"s_max must be positive, finite and at least {smallest}; got {s_max}")
        self.betas, self.s_init, self.s_decay, self.eps = betas, s_init, float(s_decay), float(eps)
        # One tensor, so that a checkpoint holds the tuner whole or not at all.
        self.state = torch.zeros(variant.rows, len(betas), dtype=torch.float64)
        # The last step's h and sums, for whoever watches; nan before the first step.
        self.h = torch.full((), math.nan, dtype=torch.float64)
        self.sums = Sums(self.h, self.h, self.h, self.h, self.h)
        self.reset()

    def reset(self) -> None:
        """Go back to the start, in place."""
        self.state.zero_()
        self.state[BETAS].copy_(torch.tensor(self.betas, dtype=torch.float64))
        self.state[VARIANT].fill_(list(VARIANTS).index(self.variant.name))

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
        if state.ndim == 2 and state.shape[0] > VARIANT and int(state[VARIANT, 0]) != names.index(self.variant.name):
            saved_name = dict(enumerate(names)).get(int(state[VARIANT, 0]), "unknown to this version")
            raise ValueError(f"the saved tuner is of variant {saved_name}, this one {self.variant.name}; pass the same")
        if state.ndim == 2 and state.shape[0] != self.state.shape[0]:
            raise ValueError(
                f"the saved tuner has {state.shape[0]} rows, this one {self.state.shape[0]}: another version of manic "
                "saved it; load it with that version, or start the tuner anew from the base optimizer's state"
            )
        # Compared with the arguments, since the state itself may be what was just loaded into.
        fits = state.shape == self.state.shape and all(
            math.isclose(a, b, rel_tol=1e-7) for a, b in zip(state[BETAS].tolist(), self.betas)
        )
        if not fits:
            has_betas = state.ndim == 2 and state.shape[0] > BETAS
            saved = state[BETAS].tolist() if has_betas else f"shape {tuple(state.shape)}"
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
        return self.state[UPDATES, 0]

    @property
    def nonfinite(self) -> Tensor:
        """Number of steps that were left out, or not learned from, because their sums were not finite: 0-dim."""
        return self.state[NONFINITE, 0]

    def skip(self) -> None:
        """Count a step that is not taken because its sums are not finite."""
        self.state[NONFINITE].add_(1)

    def hold(self) -> Held:
        """Remember what :meth:`put_back` puts back."""
        return Held(self.state.clone(), self.h, self.sums)

    def put_back(self, held: Held) -> None:
        """Be what it was, in place."""
        self.state.copy_(held.state)
        self.h, self.sums = held.h.to(self.state), Sums(*(value.to(self.state) for value in held.sums))

    @property
    def scale(self) -> Tensor:
        """S, the factor on Delta, or on updates where the variant multiplies: 0-dim, a new tensor."""
        scale = self.state[S].sum()
        return scale if self.variant.keeps_negative_reward else scale.clamp(min=0.0)

    @property
    @abstractmethod
    def position(self) -> tuple[Tensor, float]:
        """The factor f in x = x_ref + f * Delta, 0-dim, and what is added to it where Delta is recomputed from x."""

    @abstractmethod
    def has_gained(self) -> bool:
        """Whether moving has paid so far. The host waits for the device."""

    @abstractmethod
    def _learn(self, sums: Sums) -> tuple[Tensor, Mapping[int, Tensor]]:
        """h, and the rows of the state that a step changes, as they will be; S is bounded."""

    def rebased(self) -> None:  # noqa: B027  (most have nothing to do then)
        """Be told that x_ref is now where x is."""

    def update(self, sums: Sums) -> Tensor:
        """Learn from a step, and return the new S.

        From sums that are not finite, or that lead to what is not, nothing is learned: they are counted.

        Args:
            sums: The step's inner products over the whole model.

        Returns:
            S_{t+1}: 0-dim. No host synchronisation takes place.
        """
        rows = self.state.unbind()
        counted = {UPDATES: rows[UPDATES] + 1}
        h, learned = self._learn(sums)
        new = self._with(rows, {**learned, **counted})
        unchanged = self._with(rows, {NONFINITE: rows[NONFINITE] + 1, **counted})
        # A divisor that is infinite would not show in h.
        finite = new.isfinite().all() & torch.stack(sums).isfinite().all()
        self.state.copy_(torch.where(finite, new, unchanged))
        self.h, self.sums = h, sums
        return self.scale

    @staticmethod
    def _with(rows: Sequence[Tensor], changed: Mapping[int, Tensor]) -> Tensor:
        return torch.stack([changed.get(index, row) for index, row in enumerate(rows)])

    def _bounded(self, s: Tensor) -> Tensor:
        return s if self.s_max is None else s * (self.s_max / s.sum()).clamp(max=1.0)
