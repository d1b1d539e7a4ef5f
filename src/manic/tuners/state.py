"""A tuner's state as small tensors: how it is packed, checked against a saved one, and loaded.

Checkpoints keep it in the param groups, where torch leaves dtype and shape alone on any number of ranks: one tensor in
all of them, or, of a scale per group, each group's column in that group. Rows have names; the first four are the same
for every tuner.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from manic.tuners.base import Proposal, Tuner

__all__ = ["HEADER", "SCHEMA", "TunerState", "tag_of"]

SCHEMA = 0x4D0001
"""The first row of every state: a number that no other quantity has, and the version of the schema in its low bits."""

HEADER = ("schema", "tuner", "updates", "nonfinite")
"""The rows before a tuner's own: the schema; which tuner; the number of steps taken; the number of steps that were left
out, or not learned from, because their sums were not finite."""


def tag_of(name: str, fields: Sequence[str], references: Sequence[float], groups: int | None = None) -> int:
    """The number that stands for a tuner's name, the order of its fields, its references, and how many scales it has.

    It is below 2**24, so that float32 holds it. A single reference that stays is not in it.

    Args:
        name: The variant.
        fields: Its rows.
        references: How fast each follows x.
        groups: How many param groups have a scale of their own; ``None``: there is one scale.
    """
    rates = [float(rate) for rate in references]
    words = (name, *fields) if rates == [0.0] else (name, *fields, f"references {rates}")
    words = words if groups is None else (*words, f"a scale for each of {groups} groups")
    return zlib.crc32(",".join(words).encode()) & 0xFFFFFF


class TunerState:
    """The state of one tuner between steps.

    Args:
        tuner: Whose state it is.
        groups: How many param groups there are, if each has a scale of its own; ``None``: there is one scale.
    """

    def __init__(self, tuner: Tuner, groups: int | None = None) -> None:
        self.tuner, self.is_per_group = tuner, groups is not None
        self._device, self._dtype = torch.device("cpu"), torch.float64
        self._made: list[Tensor] = []
        self.parts = [self._make() for _ in range(groups or 1)]
        """What param groups hold: the one tensor of shape [rows, columns], or each group's, [rows, 1]. In float64
        (float32 on a device without it); they are changed in place."""
        self.was_absent = [False for _ in self.parts]
        """Which of them the last load did not find."""
        self.reset()

    def _make(self) -> Tensor:
        rows = len(HEADER) + len(self.tuner.fields)
        self._made.append(torch.zeros(rows, self.tuner.columns, dtype=self._dtype, device=self._device))
        return self._made[-1]

    @property
    def tensor(self) -> Tensor:
        """All of it, shape [rows, columns]: a new tensor if there is a scale per group."""
        return torch.cat(self.parts, dim=1) if self.is_per_group else self.parts[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of S, and of each sum: ``()``, or the number of groups."""
        return (len(self.parts),) if self.is_per_group else ()

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.parts[0].device

    @property
    def tag(self) -> int:
        """What stands for the tuner, and the number of groups, in a saved state."""
        return tag_of(self.tuner.name, self.tuner.fields, self.tuner.references, *self.shape)

    def reset(self) -> None:
        """Go back to the start, in place."""
        for part in self.parts:
            self._begin(part)

    def _begin(self, part: Tensor) -> None:
        part.zero_()
        rows = self.tuner.rows(part)
        rows["schema"].fill_(SCHEMA)
        rows["tuner"].fill_(self.tag)
        for name, value in self.tuner.initial().items():
            rows[name].copy_(torch.as_tensor(value, dtype=torch.float64, device="cpu"))

    def to(self, device: torch.device) -> None:
        """Move to ``device``, in float64, or in float32 where the device has no float64."""
        self._device, self._dtype = device, torch.float32 if device.type == "mps" else torch.float64
        if self.parts[0].is_meta:  # what was counted there is nothing
            self.parts = [self._make() for _ in self.parts]
            self.reset()
        self.parts = [part.to(device, self._dtype) for part in self.parts]
        self._made = list(self.parts)

    def write(self, tensor: Tensor) -> None:
        """Take over the values of a :attr:`tensor`, in place."""
        for part, columns in zip(self.parts, torch.split(tensor, self.tuner.columns, dim=1)):
            part.copy_(columns)

    def commit(self, proposal: Proposal) -> None:
        """Take over a proposal, in place."""
        self.write(proposal.state)

    def skip(self) -> None:
        """Count a step that is not taken because its sums are not finite."""
        for part in self.parts:
            self.tuner.rows(part)["nonfinite"].add_(1)

    def set_updates(self, number: float) -> None:
        """Let ``number`` be the number of steps taken."""
        for part in self.parts:
            self.tuner.rows(part)["updates"].fill_(number)

    @property
    def scale(self) -> Tensor:
        """S, of :attr:`shape`: a new tensor."""
        return self.tuner.scale_of(self.tuner.rows(self.tensor), self.is_per_group)

    @property
    def updates(self) -> Tensor:
        """Number of steps taken, those included from which nothing was learned: 0-dim, a view."""
        return self.tuner.rows(self.parts[0])["updates"][0]

    @property
    def nonfinite(self) -> Tensor:
        """Number of steps left out, or not learned from: 0-dim, a view."""
        return self.tuner.rows(self.parts[0])["nonfinite"][0]

    @property
    def has_left_start(self) -> list[bool]:
        """Whether each S has left its start. The host waits for the device."""
        return [self.tuner.has_left_start(self.tuner.rows(part)) for part in self.parts]

    def check(self, saved: Tensor) -> None:
        """Raise unless ``saved`` is what a param group holds of a tuner like this one.

        Raises:
            ValueError: if another version of manic, another tuner, or one with other settings saved it.
        """
        tuner, mine = self.tuner, self.parts[0]
        if saved.ndim != 2 or saved.shape[0] < len(HEADER) or float(saved[0, 0]) != SCHEMA:
            raise ValueError(
                f"the saved tuner, of shape {tuple(saved.shape)}, does not have schema {SCHEMA & 0xFFFF}: another "
                "version of manic saved it. Load it with that version, or load the base optimizer's state alone: "
                "the tuner restarts"
            )
        if int(saved[1, 0]) != self.tag:
            from manic.tuners.registry import name_of, with_scales

            there = name_of(int(saved[1, 0]), tuner)
            advice = "pass the same"
            if self.is_per_group or there.startswith(f"{tuner.name} "):
                advice = (
                    "pass the same variant and scale, and load before groups are added or removed; or load the base "
                    "optimizer's state alone: the tuner restarts"
                )
            raise ValueError(
                f"the saved tuner is of variant {there}, this one {with_scales(tuner.name, *self.shape)}; {advice}"
            )
        if saved.shape[0] != mine.shape[0]:
            raise ValueError(f"the saved tuner has {saved.shape[0]} rows, this one {mine.shape[0]}; it is incomplete")
        rows, initial = tuner.rows(saved), tuner.initial()
        for name in tuner.fixed:
            ours = torch.as_tensor(initial[name], dtype=torch.float64, device="cpu").reshape(-1).tolist()
            theirs = rows[name].tolist()
            alike = len(ours) == len(theirs) and all(math.isclose(a, b, rel_tol=1e-7) for a, b in zip(ours, theirs))
            if not alike:
                raise ValueError(f"the saved tuner has other {name}: {theirs} there, {ours} here; pass the same")
        if saved.shape != mine.shape:
            raise ValueError(f"the saved tuner has {saved.shape[1]} columns, this one {mine.shape[1]}")

    def load(self, *found: Tensor | None) -> None:
        """Copy a saved state into this one, in place; go back to the start if there is none.

        Args:
            found: What each param group held, ``None`` where nothing was saved. Of one scale, the first counts.

        Raises:
            ValueError: as :meth:`check` does.
        """
        if self.is_per_group and len(found) != len(self.parts):
            self.take([None for _ in found])
        values = [None if each is None else each.clone() for each in found]  # they may be parts of another group
        known = [each for each in values if each is not None]
        for each in known if self.is_per_group else known[:1]:
            self.check(each)
        self.reset()
        if not known:
            return
        self.was_absent = [each is None for each in values] if self.is_per_group else [False]
        for part, value in zip(self.parts, values if self.is_per_group else known):
            part[2 : len(HEADER)] = known[0][2 : len(HEADER)]
            if value is not None:
                part.copy_(value)

    def take(self, found: Sequence[Tensor | None]) -> bool:
        """Follow the param groups: a group keeps its column wherever it goes, and a new one begins at S = 0.

        Args:
            found: What each group holds; ``None``: nothing yet.

        Returns:
            Whether a saved state was among it, and is loaded.

        Raises:
            ValueError: as :meth:`check` does; nothing has changed then.
        """
        ours, before = {id(part): part for part in self._made}, self.parts
        if not self.is_per_group:
            loaded = next((each for each in found if each is not None and each is not before[0]), None)
            if loaded is not None:
                self.load(loaded)
            return loaded is not None
        if not found or list(map(id, found)) == list(map(id, before)):
            return False
        foreign = [each for each in found if each is not None and id(each) not in ours]
        # A copy of a group's dict has the group's own part: pop gives it to the first alone.
        taken = [None if each is None else ours.pop(id(each), None) for each in found]
        self.parts = [self._make() if part is None else part for part in taken]
        try:
            for each in foreign:
                self.check(each)
        except BaseException:
            self.parts = before
            raise
        were_absent = dict(zip(map(id, before), self.was_absent))
        self.was_absent = [were_absent.get(id(part), False) for part in self.parts]
        header = (foreign or before)[0][2 : len(HEADER)].clone()
        for part, mine, value in zip(self.parts, taken, found):
            if mine is None:
                self._begin(part)
                if value is not None and any(value is each for each in foreign):
                    part.copy_(value)
            part[1], part[2 : len(HEADER)] = self.tag, header
        return bool(foreign)

    def complete(self, of_ranks: Sequence[Sequence[list[list[float]] | None]]) -> None:
        """Fill in what the last load did not find on this rank, but on others: a group may have no parameter here.

        Args:
            of_ranks: :attr:`loaded` of each rank.
        """
        for index, part in enumerate(self.parts):
            known = [parts[index] for parts in of_ranks if index < len(parts) and parts[index] is not None]
            if self.was_absent[index] and known:
                part.copy_(torch.tensor(known[0], dtype=torch.float64, device="cpu"))
        self.was_absent = [False for _ in self.parts]

    @property
    def loaded(self) -> list[list[list[float]] | None]:
        """The values of each part; ``None`` where the last load found none. The host waits for the device."""
        return [None if absent else part.tolist() for part, absent in zip(self.parts, self.was_absent)]
