"""The captures of parameters that keep their place in a step: frozen ones, and those with a learning rate of 0.

What a capture may know is said in capture.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from manic.step.capture import Capture, Change, Operands
from manic.step.chunks import Scratch
from manic.step.kernels import set_reference, working_dtype
from manic.step.shards import Shard

__all__ = ["Frozen", "Held"]


class Frozen(Capture):
    """For parameters that were trained and are frozen, where S is in Delta: they are left alone."""


class Held(Capture):
    """x stays where it is, frozen or at a learning rate of 0; x_ref follows S, so that x_ref + f * Delta is x."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        super().__init__(shards)
        self._change: Change | None = None

    def after(self, scratch: Scratch) -> Iterator[Operands]:
        """x."""
        for (x,) in self.pieces("x"):
            yield {"x": x}

    def write(self, change: Change, scratch: Scratch) -> None:
        """Move x_ref from where f_t needs it to where f_{t+1} does."""
        assert change.weight is None, "S is in Delta, which stays"
        self._change, factor = change, self._factor(change)
        for x, x_ref, delta in self.pieces("x", "x_ref", "delta", written=(1,)):
            if delta is None:
                delta, factor_ = self.position.delta_from(x, x_ref, scratch), factor + self.position.eps
            else:
                factor_ = factor
            set_reference(x_ref, x, delta, factor_)
            self._note_written(x)
        self._written = sys.maxsize

    def undo(self) -> None:
        """Move x_ref back."""
        for start, x, x_ref, delta in self._pieces_of_each("x", "x_ref", "delta"):
            if self._change is None or self._written <= start:
                continue
            if delta is None:
                delta = (x.to(working_dtype(x)) - x_ref) / (self._factor(self._change) + self.position.eps)
                set_reference(x_ref, x, delta, self.position.divisor_for(x))
            else:
                set_reference(x_ref, x, delta, self.position.factor_for(x))

    def end(self) -> None:
        """Hold nothing of the step any longer."""
        super().end()
        self._change = None
