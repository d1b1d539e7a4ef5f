"""How the base optimizer's update of one batch is taken, and how x is written from it: one class for each method.

A capture knows the plain local tensors of its batch. It is given the factor and the weight that a rule made of S, and
knows no tuner, no placement and no rank.

*Displacement space.* An update that does not depend on where the parameters are can be made on Delta instead of on x:
no copy, and no cancellation. The base optimizer is handed Delta in the parameter's place (:class:`DeltaAsStandIn`), or
the parameter's storage holds a displacement during its step (:class:`DeltaInStorage`, :class:`UpdateInStorage`). Weight
decay, which does depend on x, is made by hand.

*Snapshot.* For every other update: :mod:`manic.step.snapshot`.

*Scaled.* Where S multiplies updates and is known before the step, an update that is proportional to the learning rate
can be left to the base optimizer: x is where it leaves it (:class:`ScaledLearningRate`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from manic.distributed.layout import local_storage
from manic.distributed.sample import sample_of, sample_shaped
from manic.step.chunks import Scratch, pieces
from manic.step.kernels import add_product, set_reference, working_dtype, write
from manic.step.position import Position, displacement, place_of
from manic.step.shards import Shard

__all__ = [
    "Capture", "Change", "DeltaAsStandIn", "DeltaInStorage", "NoUpdate", "Operands", "ScaledLearningRate",
    "UpdateInStorage", "add_update", "update_of",
]  # fmt: skip

Operands = dict[str, Tensor]
"""Pieces of one shape by name: ``"delta"``, ``"x"``, ``"grad"``, ``"update"``; without those that there are not. Of a
further reference i by themselves: ``"delta_i"``, and ``"grad_i"``, the gradient of the same elements."""


class Change(NamedTuple):
    """What a step does with an update u: Delta += weight * u, and x = x_ref + factor * Delta. 0-dim tensors."""

    factor: Tensor
    weight: Tensor | None
    """``None``: 1."""


class Capture:
    """The batch of a capture, and what is under way in the middle of a step.

    Args:
        shards: Alike in group, dtype, device and replicas, and worked on as one.
    """

    decays_by_hand: ClassVar[bool] = False
    """The base optimizer's weight decay is 0 during its step, and is made here."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = shards
        self.first = shards[0]
        self.decay: float | Tensor = 0.0
        """How much of x_t decoupled weight decay adds to Delta, a negative number: set for the base step."""
        self._columns: dict[str, list[Tensor | None]] = {}

    def begin(self, position: Position) -> None:
        """Take in f_t, and the tensors of the shards as they are now."""
        self.position = position
        found = self.first.find(self.first.optimizer, [shard.parameter for shard in self.shards])
        x: list[Tensor | None] = [shard.x for shard in self.shards]
        if self.first.has_state:
            *references, delta = ([None if each is None else local_storage(each) for each in row] for row in found)
        else:
            references, delta = [x], found[-1]
        self.references = ["x_ref", *(f"x_ref_{index}" for index in range(1, len(references)))]
        gradient = [shard.gradient for shard in self.shards]
        self._columns = {"x": x, "delta": delta, "gradient": gradient, **dict(zip(self.references, references))}
        self.is_stored = delta[0] is not None
        # How many elements, from the first, hold a displacement for the base step, and how many hold x_{t+1}.
        self._entered = self._written = 0
        self._moved_ref: Change | None = None

    def end(self) -> None:
        """Hold nothing of the step any longer."""
        self._columns = {}

    def of_sample(self, *names: str, written: Sequence[int] = (), in_place: bool = False) -> Iterator[tuple[Any, ...]]:
        """As :meth:`pieces`; but of a sampled parameter x and the gradient are samples, of which references are."""
        columns = [self._columns[name] for name in names]
        if self.first.is_sampled:
            views = (sample_of if name in ("x", "gradient") else sample_shaped for name in names)
            columns = [
                [
                    None if tensor is None else view(tensor, shard.parameter.shape[-1])
                    for tensor, shard in zip(column, self.shards)
                ]
                for view, column in zip(views, columns)
            ]
        return pieces(*columns, written=written, in_place=in_place)

    def before(self, scratch: Scratch) -> Iterator[Operands]:
        """Every piece of Delta_t, x_t and the gradient, and of each further reference; nothing is changed.

        Of a sampled parameter, every piece of the sample. Without displacements where x is held.
        """
        if self.first.is_held:
            for x, gradient in self.of_sample("x", "gradient"):
                yield {"x": x} if gradient is None else {"x": x, "grad": gradient}
            return
        is_stored, several = self.is_stored, len(self.references) > 1
        names = ["x", "gradient", *(self.references if several or not is_stored else ()), *(["delta"] * is_stored)]
        for row in self.of_sample(*names):
            piece = dict(zip(names, row))
            for index, reference in enumerate(self.references):
                number = f"_{index}" if index else ""
                operands = {f"delta{number}": self._displacement(piece, reference, scratch)}
                if index == 0:
                    operands["x"] = piece["x"]
                if piece["gradient"] is not None:
                    operands[f"grad{number}"] = piece["gradient"]
                yield operands

    def _displacement(self, piece: Operands, reference: str, scratch: Scratch) -> Tensor:
        if reference != "x_ref":
            return displacement(place_of(piece, scratch), piece[reference], scratch)
        return piece["delta"] if "delta" in piece else self.position.delta_from(piece["x"], piece["x_ref"], scratch)

    def enter(self, scratch: Scratch) -> None:
        """Make x ready for the base step."""

    def after(self, scratch: Scratch) -> Iterator[Operands]:
        """Every piece of what the base optimizer left; nothing is changed."""
        raise AssertionError(f"{type(self).__name__} cannot tell the update from x")

    def places(self) -> Iterator[tuple[Shard, Tensor, Tensor | None]]:
        """Every shard with its storage as the base optimizer left it, and with x_t where there is a copy."""
        copies = self._columns.get("x_before") or [None] * len(self.shards)
        for shard, x, before in zip(self.shards, self._columns["x"], copies):
            assert x is not None
            yield shard, x, before

    def write(self, change: Change, scratch: Scratch) -> None:
        """Complete Delta by the update, and write x_{t+1}."""

    def undo(self) -> None:
        """After an error, set x to x_ref + f_t * Delta, with Delta as the base optimizer has left it."""

    def gradients(self) -> list[Tensor]:
        """Those that there are, whole."""
        return [gradient for gradient in self._columns["gradient"] if gradient is not None]

    def unread_gradients(self) -> list[Tensor]:
        """Those of which :meth:`before` shows a sample only."""
        return self.gradients() if self.first.is_sampled else []

    def pieces(self, *names: str, written: Sequence[int] = ()) -> Iterator[tuple[Any, ...]]:
        """Walk through tensors of the batch side by side; see :func:`manic.step.chunks.pieces`."""
        return pieces(*(self._columns[name] for name in names), written=written)

    def _factor(self, change: Change) -> Tensor:
        x = self._columns["x"][0]
        assert x is not None
        return change.factor.to(x.device, working_dtype(x))

    def _pieces_of_each(self, *names: str) -> Iterator[tuple[Any, ...]]:
        """Pieces of one shard after the other, with how many elements of the shard come before."""
        for index in range(len(self.shards)):
            start = 0
            for row in pieces(*([self._columns[name][index]] for name in names)):
                yield start, *row
                start += row[0].numel()

    def _note_written(self, piece: Tensor) -> None:
        if len(self.shards) == 1:  # of several, a piece is a copy, which is back in its places only later
            self._written += piece.numel()

    def _move_reference(self, x_ref: Tensor, x: Tensor, delta: Tensor, change: Change, *, is_stored: bool) -> None:
        """Let x be x_ref + f_{t+1} * Delta by moving x_ref, for one that keeps its place."""
        factor = self._factor(change)
        set_reference(x_ref, x, delta, factor if is_stored else factor + self.position.eps)

    def _return_reference(self, x: Tensor, x_ref: Tensor, delta: Tensor | None, start: int) -> None:
        """Let x_ref be where f_t needs it, after an error in a :meth:`write` that moves it."""
        if self._moved_ref is None:
            return
        if delta is not None:
            set_reference(x_ref, x, delta, self.position.factor_for(x))
        elif start < self._written:
            delta = (x.to(working_dtype(x)) - x_ref) / (self._factor(self._moved_ref) + self.position.eps)
            set_reference(x_ref, x, delta, self.position.divisor_for(x))

    def _return_to(self, x: Tensor, x_ref: Tensor, delta: Tensor) -> None:
        """Let x be x_ref + f_t * Delta; but where it is so to rounding, x keeps every bit."""
        right = torch.empty_like(x)
        write(right, x_ref, delta, self.position.factor_for(x))
        rounding = 4 * torch.finfo(x.dtype).eps * (x_ref.abs() + right.abs())
        x.copy_(torch.where((right - x).abs() <= rounding, x, right))


class NoUpdate(Capture):
    """For parameters that have had no gradient yet: they count in |x|^2."""

    def after(self, scratch: Scratch) -> Iterator[Operands]:
        """x."""
        for (x,) in self.pieces("x"):
            yield {"x": x}


class ScaledLearningRate(Capture):
    """The base optimizer steps on x with S in its learning rate, weight decay and all; Delta is x - x_ref."""


class DeltaAsStandIn(Capture):
    """The base optimizer steps on Delta, which it finds where it knows the parameter."""

    decays_by_hand = True

    def write(self, change: Change, scratch: Scratch) -> None:
        """Add weight decay to Delta, where the update is already, and write x."""
        assert change.weight is None, "the update has arrived in Delta as it is"
        factor = self._factor(change)
        for x, x_ref, delta in self.pieces("x", "x_ref", "delta", written=(0, 2)):
            write(x, x_ref, delta, factor, self.decay)
            self._note_written(x)
        self._written = sys.maxsize

    def undo(self) -> None:
        """Delta is the base optimizer's by now; x follows it."""
        for _, x, x_ref, delta in self._pieces_of_each("x", "x_ref", "delta"):
            self._return_to(x, x_ref, delta)


class UpdateInStorage(Capture):
    """x's storage holds what weight decay adds, and then the update, while Delta is kept beside it."""

    decays_by_hand = True

    def enter(self, scratch: Scratch) -> None:
        """``x *= decay``; x is not read where the factor is known to be 0."""
        for (x,) in self.pieces("x", written=(0,)):
            if isinstance(self.decay, Tensor) or self.decay:
                x.mul_(self.decay)
            else:
                x.zero_()
            if len(self.shards) == 1:
                self._entered += x.numel()
        self._entered = sys.maxsize

    def after(self, scratch: Scratch) -> Iterator[Operands]:
        """The update."""
        for x, gradient in self.pieces("x", "gradient"):
            yield {} if self.first.is_held else update_of(x, gradient)

    def write(self, change: Change, scratch: Scratch) -> None:
        """Add the update to Delta, and write x."""
        factor = self._factor(change)
        for x, x_ref, delta in self.pieces("x", "x_ref", "delta", written=(0, 2)):
            write(x, x_ref, add_update(delta, x, change.weight), factor)
            self._note_written(x)
        self._written = sys.maxsize

    def undo(self) -> None:
        """Write x where it holds an update."""
        for start, x, x_ref, delta in self._pieces_of_each("x", "x_ref", "delta"):
            if self._written <= start < self._entered:
                write(x, x_ref, delta, self.position.factor_for(x))
            else:
                self._return_to(x, x_ref, delta)


class DeltaInStorage(Capture):
    """x's storage holds Delta, recomputed from it, with what weight decay adds, and then Delta_{t+1}."""

    decays_by_hand = True

    def enter(self, scratch: Scratch) -> None:
        """``x = Delta_t + decay * x``."""
        for x, x_ref in self.pieces("x", "x_ref", written=(0,)):
            delta = self.position.delta_from(x, x_ref, scratch)
            if x.dtype == delta.dtype and not isinstance(self.decay, Tensor):
                torch.add(delta, x, alpha=self.decay, out=x)
            else:
                x.copy_(add_product(delta, x.to(delta.dtype), self.decay))
            if len(self.shards) == 1:
                self._entered += x.numel()
        self._entered = sys.maxsize

    def write(self, change: Change, scratch: Scratch) -> None:
        """Write x from the Delta that it holds."""
        assert change.weight is None, "the update has arrived in Delta as it is"
        factor = self._factor(change)
        for x, x_ref in self.pieces("x", "x_ref", written=(0,)):
            write(x, x_ref, x, factor)
            self._note_written(x)
        self._written = sys.maxsize

    def undo(self) -> None:
        """Solve for Delta_t what x holds, Delta_t + decay * x_t = (1 + decay * f) * Delta_t + decay * x_ref."""
        for start, x, x_ref in self._pieces_of_each("x", "x_ref"):
            if self._written <= start < self._entered:
                factor = self.position.divisor_for(x)
                delta = (x.to(factor.dtype) - self.decay * x_ref) / (1.0 + self.decay * factor)
                write(x, x_ref, delta, factor)


def update_of(update: Tensor, gradient: Tensor | None) -> Operands:
    """The update where there is a gradient: elsewhere it is of weight decay alone."""
    return {} if gradient is None else {"update": update * (gradient != 0)}


def add_update(delta: Tensor, update: Tensor, weight: Tensor | None) -> Tensor:
    """``delta += weight * update``."""
    return delta.add_(update) if weight is None else delta.addcmul_(update, weight.to(delta))
