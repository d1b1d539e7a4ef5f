"""What a tuner is: a pure function of a small state and a step's sums, which proposes the next state and scale.

A tuner knows a few numbers a step and nothing of where they come from or go to: no parameter, no rank, no host.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from manic.tuners.state import HEADER, tag_of

__all__ = ["EARLY_SUMS", "LATE_SUMS", "MOST_REFERENCES", "Learned", "Proposal", "Sums", "Tuner", "early_sums"]

Sums = Mapping[str, Tensor]
"""Inner products by name, each over every element of the model once, or of each param group: 0-dim, or [columns] with a
scale per group; of the tuner's dtype, on its device."""

EARLY_SUMS = ("delta_grad", "grad_square", "delta_x", "delta_square", "x_square", "lr")
"""What a tuner may ask for before the base step: ``<Delta_t, g_t>``, ``|g_t|^2``, ``<Delta_t, x_t>``, ``|Delta_t|^2``,
``|x_t|^2``, and the largest learning rate of all param groups, or of the one that the sums are of, on all ranks.
``Delta_t`` is ``x_t - x_ref`` where S multiplies updates."""

MOST_REFERENCES = 8
"""How many references a tuner may have: each is a copy of the parameters."""


def early_sums(references: int) -> tuple[str, ...]:
    """What a tuner with so many references may ask for before the base step.

    That is :data:`EARLY_SUMS`, and of each further reference i ``delta_grad_i``, ``<x_t - ref_i, g_t>``,
    and ``delta_square_i``, ``|x_t - ref_i|^2``.
    """
    further = (f"{name}_{index}" for index in range(1, references) for name in ("delta_grad", "delta_square"))
    return (*EARLY_SUMS, *further)


LATE_SUMS = ("delta_x", "x_square", "update_square")
"""What it may ask for after the base step: ``<Delta_t, y>`` and ``|y|^2``, where y is x as that step left it;
``|u_t|^2`` over the elements whose gradient is not 0: elsewhere an update is of weight decay alone."""


class Learned(NamedTuple):
    """What :meth:`Tuner.learn` makes of a step."""

    rows: Mapping[str, Tensor]
    """The fields that change, shape [columns]."""
    signal: Tensor
    """``h`` of the paper, or what the tuner has in its place: of the shape of a sum, for whoever watches."""


@dataclass(frozen=True)
class Proposal:
    """The outcome of a step, not yet committed."""

    state: Tensor
    """The next state, packed as :class:`manic.tuners.state.TunerState` holds it."""
    scale: Tensor
    """S_{t+1}, of the shape of a sum, like the signal."""
    signal: Tensor
    sums: Sums
    shares: tuple[Tensor | None, ...]
    """How far each reference moves towards x after the step, in [0, 1]: 0-dim; ``None``: it stays."""


class Tuner(ABC):
    """Learns the scale. A subclass is one rule: what it declares, :meth:`initial` and :meth:`learn`.

    Args:
        s_max: The largest scale, positive. ``None``: no bound.

    Raises:
        ValueError: if ``s_max`` is out of its range.
    """

    name: ClassVar[str]
    """The variant's name."""
    scales: ClassVar[Literal["displacement", "updates"]]
    """What S multiplies: Delta, the sum of bare updates (x = x_ref + S Delta), or each update (x += S u)."""
    sums: ClassVar[tuple[str, ...]]
    """The sums that it learns from, of :func:`early_sums`."""
    references: ClassVar[tuple[float, ...]] = (0.0,)
    """Where displacements are measured from, x_ref first: how fast each follows x. After update n a reference moves by
    the share min(1, k / n) towards x, so that it is an average over about the last 1/k of the run; 0: it stays."""
    samples: ClassVar[bool] = False
    """Early sums may be estimated from a sixteenth of large parameters, and references be of that sample alone."""
    rests: ClassVar[tuple[int, int]] = (0, 1)
    """After so many steps, early sums are made in one of so many steps. In the steps between they are 0 for
    :meth:`learn`, but for ``"lr"``, and references stay; in that one step references move as far as in all of them."""
    late_sums: ClassVar[tuple[str, ...]] = ()
    """Those it needs after the base step, of :data:`LATE_SUMS`."""
    late_until_scale: ClassVar[bool] = False
    """It needs its late sums only as long as S is 0."""
    moves_without_gradient: ClassVar[bool] = True
    """A parameter without a gradient counts as gradient 0 and follows S; otherwise it is left out, and stays."""
    fields: ClassVar[tuple[str, ...]] = ("s",)
    """The names of its own rows of the state. ``"s"`` is among them, and sums to S."""
    fixed: ClassVar[tuple[str, ...]] = ()
    """The fields that are settings: a saved state must agree in them."""
    per_group: ClassVar[bool] = False
    """It can learn a scale for each param group: its state has one column, and :meth:`learn` treats each column by
    itself if there are more, with sums of shape [columns]. Late sums of columns that do not need them are 0."""
    eps: float = 0.0
    """Added to S where Delta is recomputed as (x - x_ref) / S."""

    def __init__(self, s_max: float | None = None) -> None:
        self.s_max = None if s_max is None else float(s_max)
        smallest = self.smallest_bound
        if self.s_max is not None and not (self.s_max >= smallest and self.s_max > 0.0 and math.isfinite(self.s_max)):
            raise ValueError(f"s_max must be positive, finite and at least {smallest}; got {s_max}")

    @property
    def settings(self) -> dict[str, Any]:
        """What its constructor has set, by name: its attributes that are numbers, strings, ``None``, or tuples of them.

        All ranks must have the same.
        """
        return {name.lstrip("_"): value for name, value in vars(self).items() if _is_plain(value)}

    @property
    def smallest_bound(self) -> float:
        """What ``s_max`` must not be under."""
        return 0.0

    @property
    def columns(self) -> int:
        """The length of each row of the state."""
        return 1

    def initial(self) -> Mapping[str, float | Sequence[float]]:
        """The fields before the first step that are not 0."""
        return {}

    @abstractmethod
    def learn(self, state: Mapping[str, Tensor], sums: Sums) -> Learned:
        """Compute what a step changes, on the device, without changing ``state``.

        Args:
            state: Every field; ``"updates"``, the number of steps before this one; and ``"interval"``, for how many
                steps these sums stand: shape [columns] each.
            sums: :attr:`sums`, and :attr:`late_sums` once they are known.
        """

    def scale(self, state: Mapping[str, Tensor]) -> Tensor:
        """S: 0-dim, a new tensor."""
        return state["s"].sum()

    def scale_of(self, state: Mapping[str, Tensor], is_per_group: bool) -> Tensor:
        """S, or the S of each column: a new tensor of the shape of a sum."""
        return state["s"].clone() if is_per_group else self.scale(state)

    def has_left_start(self, state: Mapping[str, Tensor]) -> bool:
        """Whether S has left its start. The host waits for the device."""
        return bool(state["s"].sum() > 0)

    def check(self) -> None:
        """Raise ValueError where declarations do not fit together; they are documented with the attributes."""
        references = self.references
        are_rates = all(rate >= 0.0 and math.isfinite(rate) for rate in references)
        known = early_sums(len(references))
        problems = [
            (
                not (0 < len(references) <= MOST_REFERENCES and are_rates),
                f"references must be 1 to {MOST_REFERENCES} finite numbers that are not negative, got {references}",
            ),
            (self.scales != "updates" and references != (0.0,), f"references {references} need scales='updates'"),
            (not set(self.sums) <= set(known), f"sums must be among {known}, got {self.sums}"),
            ("grad_square" not in self.sums, "sums must have grad_square, by which gradients are known to be finite"),
            (not set(self.late_sums) <= set(LATE_SUMS), f"late_sums must be among {LATE_SUMS}, got {self.late_sums}"),
            (self.scales not in ("displacement", "updates"), f"scales is {self.scales!r}"),
            (self.scales != "updates" and "update_square" in self.late_sums, "update_square needs scales='updates'"),
            ("s" not in self.fields or bool(set(HEADER) & set(self.fields)), f"fields are {self.fields}"),
            (self.per_group and (self.scales != "updates" or self.columns != 1), "per_group needs scales='updates'"),
            (
                self.per_group and self.late_until_scale and not set(self.late_sums).isdisjoint(self.sums),
                "per_group needs late sums that are not early ones, where they are late until there is a scale",
            ),
            (
                not (self.rests[0] >= 0 and self.rests[1] >= 1) or (self.rests[1] > 1 and self.scales != "updates"),
                f"rests must be a number of steps and an interval, and needs scales='updates', got {self.rests}",
            ),
            (
                self.samples and not (self.scales == "updates" and set(self.late_sums) <= {"update_square"}),
                "samples needs scales='updates', and no late sums but update_square",
            ),
            (not set(self.fixed) <= set(self.fields) & set(self.initial()), "fixed fields need an initial value"),
        ]
        found = [text for is_wrong, text in problems if is_wrong]
        if found:
            raise ValueError(f"tuner {self.name!r} cannot be used: {'; '.join(found)}")

    def interval(self, updates: int) -> int:
        """In one of how many steps early sums are made, after so many updates."""
        after, interval = self.rests
        return interval if updates >= after else 1

    def late(self, has_scale: bool) -> tuple[str, ...]:
        """The sums that :meth:`refine` needs after the base step; ``has_scale``: whether S is known not to be 0."""
        return () if self.late_until_scale and has_scale else self.late_sums

    def rows(self, state: Tensor) -> dict[str, Tensor]:
        """A packed state by the names of its rows."""
        return dict(zip((*HEADER, *self.fields), state.unbind()))

    def propose(self, state: Tensor, sums: Sums, interval: int = 1) -> Proposal:
        """Learn from a step. From sums that are not finite, or lead to what is not, nothing but their number.

        Args:
            state: Packed, shape [rows, columns].
            sums: The step's, over the whole model, or over each param group: a group that is frozen learns nothing.
                Without ``"grad_square"`` where early sums are not made; there may be more than :attr:`sums`.
            interval: In one of how many steps they are made.

        Returns:
            The proposal. No host sync takes place.
        """
        rows, some = self.rows(state), next(iter(sums.values()))
        is_due, shape = "grad_square" in sums, some.shape
        absent = {} if is_due else dict.fromkeys(self.sums, torch.zeros_like(some))
        learned = self.learn({**rows, "interval": torch.full_like(rows["updates"], interval)}, {**absent, **sums})
        assert learned.rows.keys() <= set(self.fields), f"{self.name!r} learned rows that are none of {self.fields}"
        counted = {**rows, "updates": rows["updates"] + 1}
        changed, moves = dict(learned.rows), self.moves(sums) if shape and is_due else None
        if moves is not None:
            changed = {name: torch.where(moves, row, rows[name]) for name, row in changed.items()}
        new = torch.stack(list({**counted, **changed}.values()))
        unchanged = torch.stack(list({**counted, "nonfinite": rows["nonfinite"] + 1}.values()))
        # A divisor that is infinite would not show in the state.
        finite = new.isfinite().all() & torch.stack(list(sums.values())).isfinite().all()
        state = torch.where(finite, new, unchanged)
        passed = interval / counted["updates"][0]
        shares = tuple((rate * passed).clamp(max=1.0) * finite if rate and is_due else None for rate in self.references)
        scale = self.scale_of(self.rows(state), bool(shape))
        return Proposal(state, scale, learned.signal, sums, shares)

    def moves(self, sums: Sums) -> Tensor:
        """Which columns learn from a step: not those of groups without a gradient, or with a learning rate of 0."""
        moves = sums["grad_square"] != 0  # true of a nan
        return moves & (sums["lr"] != 0) if "lr" in sums else moves

    def refine(self, state: Tensor, proposal: Proposal, late: Sums, interval: int = 1) -> Proposal:
        """Propose again, with the sums that are known only after the base step."""
        return self.propose(state, {**proposal.sums, **late}, interval)

    def _bounded(self, s: Tensor) -> Tensor:
        if self.s_max is None:
            return s
        return s.clamp(max=self.s_max) if self.columns == 1 else s * (self.s_max / s.sum()).clamp(max=1.0)

    @property
    def tag(self) -> int:
        """What stands for the name, the fields and the references in a saved state with one scale."""
        return tag_of(self.name, self.fields, self.references)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def checked(name: str, value: float, smallest: float, *, strictly: bool = True) -> float:
    """``value`` as a float.

    Raises:
        ValueError: if it is not finite, or below ``smallest``, or equal to it where ``strictly``.
    """
    value = float(value)
    if not math.isfinite(value) or value < smallest or (strictly and value == smallest):
        kind = "positive" if strictly else "non-negative"
        raise ValueError(f"{name} must be {kind} and finite, got {value}")
    return value


def checked_betas(betas: Sequence[float]) -> tuple[float, ...]:
    """Decay factors as floats.

    Raises:
        ValueError: if there is none, or one is not strictly between 0 and 1.
    """
    betas = tuple(float(beta) for beta in betas)
    if not betas or not all(0.0 < beta < 1.0 for beta in betas):
        raise ValueError(f"betas must be one or more numbers strictly between 0 and 1, got {betas}")
    return betas
