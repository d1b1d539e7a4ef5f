"""A tuner's state as one small tensor: how it is packed, checked against a saved one, and loaded.

Checkpoints keep it in the param groups, where torch leaves dtype and shape alone on any number of ranks. Its rows have
names; the first four are the same for every tuner.
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


def tag_of(name: str, fields: Sequence[str], references: Sequence[float]) -> int:
    """The number that stands for a tuner's name, the order of its fields and its references.

    It is below 2**24, so that float32 holds it. A single reference that stays is not in it.
    """
    rates = [float(rate) for rate in references]
    words = (name, *fields) if rates == [0.0] else (name, *fields, f"references {rates}")
    return zlib.crc32(",".join(words).encode()) & 0xFFFFFF


class TunerState:
    """The state of one tuner between steps.

    Args:
        tuner: Whose state it is.
    """

    def __init__(self, tuner: Tuner) -> None:
        self.tuner = tuner
        self.tensor = torch.zeros(len(HEADER) + len(tuner.fields), tuner.columns, dtype=torch.float64, device="cpu")
        """Shape [rows, columns], float64 (float32 on a device without it). It is changed in place."""
        self.reset()

    def reset(self) -> None:
        """Go back to the start, in place."""
        self.tensor.zero_()
        rows = self.tuner.rows(self.tensor)
        rows["schema"].fill_(SCHEMA)
        rows["tuner"].fill_(self.tuner.tag)
        for name, value in self.tuner.initial().items():
            rows[name].copy_(torch.as_tensor(value, dtype=torch.float64, device="cpu"))

    def to(self, device: torch.device) -> None:
        """Move to ``device``, in float64, or in float32 where the device has no float64."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        if self.tensor.is_meta:  # what was counted there is nothing
            self.tensor = torch.zeros(self.tensor.shape, dtype=dtype, device=device)
            self.reset()
        self.tensor = self.tensor.to(device, dtype)

    def commit(self, proposal: Proposal) -> None:
        """Take over a proposal, in place."""
        self.tensor.copy_(proposal.state)

    def skip(self) -> None:
        """Count a step that is not taken because its sums are not finite."""
        self.tuner.rows(self.tensor)["nonfinite"].add_(1)

    def rebase(self) -> None:
        """Follow the references, which were set to x."""
        rows = self.tuner.rows(self.tensor)
        for name, value in self.tuner.rebased(rows).items():
            rows[name].copy_(value)

    @property
    def scale(self) -> Tensor:
        """S: 0-dim, a new tensor."""
        return self.tuner.scale(self.tuner.rows(self.tensor))

    @property
    def updates(self) -> Tensor:
        """Number of steps taken, those included from which nothing was learned: 0-dim, a view."""
        return self.tuner.rows(self.tensor)["updates"][0]

    @property
    def nonfinite(self) -> Tensor:
        """Number of steps left out, or not learned from: 0-dim, a view."""
        return self.tuner.rows(self.tensor)["nonfinite"][0]

    @property
    def has_left_start(self) -> bool:
        """Whether S has left its start. The host waits for the device."""
        return self.tuner.has_left_start(self.tuner.rows(self.tensor))

    def check(self, saved: Tensor) -> None:
        """Raise unless ``saved`` is the state of a tuner like this one.

        Raises:
            ValueError: if another version of manic, another tuner, or one with other settings saved it.
        """
        tuner = self.tuner
        if saved.ndim != 2 or saved.shape[0] < len(HEADER) or float(saved[0, 0]) != SCHEMA:
            raise ValueError(
                f"the saved tuner, of shape {tuple(saved.shape)}, does not have schema {SCHEMA & 0xFFFF}: another "
                "version of manic saved it. Load it with that version, or load the base optimizer's state alone: "
                "the tuner restarts"
            )
        if int(saved[1, 0]) != tuner.tag:
            from manic.tuners.registry import name_of

            variant = name_of(int(saved[1, 0]))
            raise ValueError(f"the saved tuner is of variant {variant}, this one {tuner.name}; pass the same")
        if saved.shape[0] != self.tensor.shape[0]:
            raise ValueError(
                f"the saved tuner has {saved.shape[0]} rows, this one {self.tensor.shape[0]}; it is incomplete"
            )
        rows, initial = tuner.rows(saved), tuner.initial()
        for name in tuner.fixed:
            mine = torch.as_tensor(initial[name], dtype=torch.float64, device="cpu").reshape(-1).tolist()
            theirs = rows[name].tolist()
            alike = len(mine) == len(theirs) and all(math.isclose(a, b, rel_tol=1e-7) for a, b in zip(mine, theirs))
            if not alike:
                raise ValueError(f"the saved tuner has other {name}: {theirs} there, {mine} here; pass the same")
        if saved.shape != self.tensor.shape:
            raise ValueError(f"the saved tuner has {saved.shape[1]} columns, this one {self.tensor.shape[1]}")

    def load(self, saved: Tensor) -> None:
        """Copy a saved state into this one, in place.

        Raises:
            ValueError: as :meth:`check` does.
        """
        self.check(saved)
        self.tensor.copy_(saved)
