"""The captures of parameters that keep their place in a step: frozen ones, and those with a learning rate of 0.

What a capture may know is said in capture.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from manic.step.capture import Capture, Change, Operands
from manic.step.chunks import Scratch

__all__ = ["Frozen", "Held"]


class Frozen(Capture):
    """For parameters that were trained and are frozen, where S is in Delta: they are left alone."""


class Held(Capture):
    """x stays where it is, frozen or at a learning rate of 0; x_ref follows S, so that x_ref + f * Delta is x."""

    def after(self, scratch: Scratch) -> Iterator[Operands]:
        """x."""
        for (x,) in self.pieces("x"):
            yield {"x": x}

    def write(self, change: Change, scratch: Scratch) -> None:
        """Move x_ref from where f_t needs it to where f_{t+1} does."""
        assert change.weight is None, "S is in Delta, which stays"
        self._moved_ref = change
        for x, x_ref, delta in self.pieces("x", "x_ref", "delta", written=(1,)):
            delta_t = self.position.delta_from(x, x_ref, scratch) if delta is None else delta
            self._move_reference(x_ref, x, delta_t, change, is_stored=delta is not None)
            self._note_written(x)
        self._written = sys.maxsize

    def undo(self) -> None:
        """Move x_ref back."""
        for start, x, x_ref, delta in self._pieces_of_each("x", "x_ref", "delta"):
            self._return_reference(x, x_ref, delta, start)
