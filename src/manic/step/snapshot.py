"""The capture for any update: x is kept aside for the length of the base step, and the difference is the update.

It knows what :mod:`manic.step.capture` knows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from manic.step.capture import Capture, Change, Operands, add_update, update_of
from manic.step.chunks import Scratch, pieces
from manic.step.kernels import working_dtype, write

__all__ = ["Snapshot"]


class Snapshot(Capture):
    """x is copied before the base step, and the update is what differs after it."""

    def enter(self, scratch: Scratch) -> None:
        """Copy x; x_ref serves where it was made of x in this step."""
        copies = self._columns["x_before"] = []
        for shard, x, x_ref in zip(self.shards, self._columns["x"], self._columns["x_ref"]):
            assert x is not None
            copies.append(x_ref if shard.is_new and not shard.is_sampled else x.clone())

    def after(self, scratch: Scratch) -> Iterator[Operands]:
        """Delta_t, x as it is now, and the update; of a sampled parameter without Delta_t."""
        is_stored = self.is_stored
        if self.first.is_sampled:
            for x, x_before, gradient in self.pieces("x", "x_before", "gradient"):
                yield {"x": x} if self.first.is_held else {"x": x, **update_of(x - x_before, gradient)}
            return
        columns = "x", "x_before", "delta" if is_stored else "x_ref", "gradient"
        for x, x_before, delta, gradient in self.pieces(*columns):
            if self.first.is_held:
                yield {"x": x}
                continue
            delta_t = delta if is_stored else self.position.delta_from(x_before, delta, scratch)
            yield {"x": x, "delta": delta_t, **update_of(x - x_before, gradient)}

    def write(self, change: Change, scratch: Scratch) -> None:
        """Add the update to Delta, stored or recomputed, and write x."""
        if not self.is_stored and change.weight is not None:
            self._write_scaled(change.weight)
            return
        factor, moves_ref = self._factor(change), self.first.is_held and change.weight is None
        self._moved_ref = change if moves_ref else None
        written = (0, 1, 2) if moves_ref else (0, 2)
        for x, x_ref, delta, x_before in self.pieces("x", "x_ref", "delta", "x_before", written=written):
            update = x.to(factor.dtype) - x_before
            if moves_ref:  # x_t + f * u, which is x_t where the update is 0
                is_stored = delta is not None
                delta = delta if is_stored else self.position.delta_from(x_before, x_ref, scratch)
                x.copy_(torch.addcmul(x_before.to(factor.dtype), update, factor))
                self._move_reference(x_ref, x, delta.add_(update), change, is_stored=is_stored)
            else:
                delta = self.position.delta_from(x_before, x_ref, scratch) if delta is None else delta
                write(x, x_ref, add_update(delta, update, change.weight), factor)
            self._note_written(x)
        self._written = sys.maxsize
        self._columns["x_before"] = []

    def _write_scaled(self, weight: Tensor) -> None:
        """Write x_t + weight * u, where nothing but x keeps the update."""
        for x, x_before in self.pieces("x", "x_before", written=(0,)):
            wide = working_dtype(x)
            x.copy_(torch.addcmul(x_before.to(wide), x.to(wide) - x_before, weight.to(x.device, wide)))
            self._note_written(x)
        self._written = sys.maxsize
        self._columns["x_before"] = []

    def undo(self) -> None:
        """Copy x_t back where x is not written yet; where Delta is stored, x follows it."""
        copies = self._columns.get("x_before") or [None] * len(self.shards)
        for index, before in enumerate(copies):
            start = 0
            row = [[self._columns[name][index]] for name in ("x", "x_ref", "delta")]
            if self.first.is_sampled:  # x_ref is of other elements, and is not needed
                row[1] = [None]
            for x, x_ref, delta, x_before in pieces(*row, [before]):
                if x_before is not None and self._written <= start:
                    x.copy_(x_before)
                self._return_reference(x, x_ref, delta, start)
                if delta is not None and self._moved_ref is None:
                    self._return_to(x, x_ref, delta)
                start += x.numel()
        self._columns["x_before"] = []
