"""Rows that describe shards by a few sums, and the comparison of these: equal rows are copies' or constants'."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from manic.distributed.layout import local_gradient, local_storage
from manic.distributed.parts import plain_parts
from manic.step.chunks import pieces

__all__ = ["SIZE", "TOLERANCE", "VARIES", "Seen", "moments_of", "padded", "row_of"]

# Columns of a row: see row_of.
SIZE, VARIES, _VALUES, TOLERANCE, _GRADIENT, _GRADIENT_TOLERANCE, _PLACE = 0, 1, 2, 7, 8, 13, 14
_COLUMNS = 15
# Moments of values, or of a gradient: the sum of squares, and sums with weights cos(frequency * index), several because
# one sum of different elements is within a coarse tolerance too often.
_FREQUENCIES = (1.0, 2.0**0.5, 3.0**0.5, 5.0**0.5)
_MOMENTS = 1 + len(_FREQUENCIES)
# The moments of a gradient that is not finite, which tells nothing.
_UNKNOWN = -1.0
# Copies start equal bit for bit, but devices sum in different orders, and copies in low precision come to differ.
_CLOSE_VALUES = {torch.bfloat16: 0.02, torch.float16: 2e-3}
_CLOSEST_VALUES = 1e-6
# Gradients are summed in different orders, too.
_CLOSE_GRADIENTS = {torch.bfloat16: 0.05, torch.float16: 0.05}
_CLOSEST_GRADIENTS = 1e-3
# A gradient whose sum of squares is so small beside the largest compared one may be zero but for rounding.
_ROUNDING = 1e-10


class Seen:
    """Compares rows of all ranks with one.

    Args:
        rank: This rank in the group.
        descriptions: By rank, what is equal where parameters have the same description.
        every: All rows.
    """

    def __init__(self, rank: int, descriptions: Tensor, every: Tensor) -> None:
        self.rank, self._descriptions = rank, descriptions
        self._rounding = _ROUNDING * max(0.0, float(every[..., _GRADIENT].max()))

    def tells(self, row: Tensor) -> bool:
        """Whether there is a gradient that is more than rounding."""
        return float(row[_GRADIENT]) > self._rounding

    def copies(self, rows: Tensor, row: Tensor, *, with_gradients: bool = True, in_stage: bool = True) -> Tensor:
        """Which ranks hold a copy.

        Args:
            rows: Those of each rank, shape [ranks, parameters, columns].
            row: That of which copies are counted, shape [columns].
            with_gradients: Whether gradients must be equal, too.
            in_stage: Whether a rank must have parameters of the same description as this one.

        Returns:
            Booleans, shape [ranks].
        """
        found = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        found[self._matches(rows, row, with_gradients)[0]] = True
        return found & (self._descriptions == self._descriptions[self.rank]) if in_stage else found

    def equal(self, rows: Tensor, row: Tensor) -> set[int]:
        """The ranks that hold equal values."""
        return set(self._matches(rows, row, with_gradients=False)[0].tolist())

    def confirmed(self, some: Tensor, row: Tensor, rows: Tensor) -> set[int]:
        """How often those of ``some`` rows are among ``rows`` that have equal values and a gradient that tells."""
        equal = some[self._matches(some, row, with_gradients=False)]
        return {int(self.copies(rows, each, in_stage=False).sum()) for each in equal if self.tells(each)}

    def _matches(self, rows: Tensor, row: Tensor, with_gradients: bool) -> tuple[Tensor, Tensor]:
        """Ranks and indices of equal rows."""
        ranks, indices = (rows[..., [SIZE, _PLACE]] == row[[SIZE, _PLACE]]).all(dim=-1).nonzero(as_tuple=True)
        found = rows[ranks, indices]
        are_equal = _are_close(found, row, _VALUES, TOLERANCE)
        if with_gradients:
            squares, square = found[:, _GRADIENT], row[_GRADIENT]
            tell_nothing = (squares == _UNKNOWN) | (square == _UNKNOWN)
            tell_nothing |= torch.maximum(squares, square) <= self._rounding
            are_equal &= _are_close(found, row, _GRADIENT, _GRADIENT_TOLERANCE) | tell_nothing
        return ranks[are_equal], indices[are_equal]


def _are_close(rows: Tensor, row: Tensor, first: int, tolerance: int) -> Tensor:
    """Whether moments are equal up to rounding: where elements cancel, a sum is small beside their norm."""
    margin = torch.maximum(rows[:, tolerance], row[tolerance])
    largest = torch.maximum(rows[:, first], row[first])
    difference = (rows[:, first : first + _MOMENTS] - row[first : first + _MOMENTS]).abs()
    norm = largest.clamp(min=0).sqrt()[:, None]
    return (difference[:, 0] <= margin * largest) & (difference[:, 1:] <= margin[:, None] * norm).all(dim=1)


def row_of(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Describe the local shard: number of elements, whether they differ, moments and their tolerance, moments of the
    gradient, 0 without one, and their tolerance, and which of the shards it is by its placements. Shape [columns]."""
    gradient = local_gradient(parameter)
    row = torch.zeros(_COLUMNS, dtype=dtype, device=local_storage(parameter).device)
    for x in plain_parts(parameter):
        row[SIZE] += x.numel()
        row[_VALUES : _VALUES + _MOMENTS] += moments_of(x, dtype)
        row[TOLERANCE].clamp_(min=_CLOSE_VALUES.get(x.dtype, _CLOSEST_VALUES))
        if x.numel():
            varies = torch.stack([(piece != x.reshape(-1)[0]).any() for (piece,) in pieces([x])]).any()
            row[VARIES] = torch.maximum(row[VARIES], varies.to(dtype))
    if gradient is not None:
        moments = moments_of(gradient, dtype)
        row[_GRADIENT : _GRADIENT + _MOMENTS] = torch.where(moments.isfinite().all(), moments, _UNKNOWN)
        row[_GRADIENT_TOLERANCE] = _CLOSE_GRADIENTS.get(gradient.dtype, _CLOSEST_GRADIENTS)
    row[_PLACE] = _place(parameter)
    return row


def moments_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of squares, and sums with weights, which tell a permutation, and average out what all elements share.

    Shape [5], on the device of ``x``.
    """
    moments, start = torch.zeros(_MOMENTS, dtype=dtype, device=x.device), 0
    for (piece,) in pieces([x]):
        wide = piece.reshape(-1).to(dtype)
        places = torch.arange(start, start + wide.numel(), dtype=dtype, device=x.device)
        moments[0] += torch.dot(wide, wide)
        for index, frequency in enumerate(_FREQUENCIES, start=1):
            moments[index] += torch.dot(wide, (places * frequency).cos())
        start += wide.numel()
    return moments


def _place(parameter: Tensor) -> int:
    """A number of this rank's coordinates in the parameter's mesh, along the dimensions that split it."""
    if not isinstance(parameter, DTensor):
        return 0
    mesh = parameter.device_mesh
    coordinate: Sequence[int] = mesh.get_coordinate() or ()
    place = 0
    for index, size, placement in zip(coordinate, mesh.shape, parameter.placements):
        if not isinstance(placement, Replicate):
            place = place * size + index
    return place


def padded(rows: list[Tensor], number: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Stacked, with rows of no rank's parameters up to ``number``: other stages of a pipeline may have more."""
    missing = torch.full((number - len(rows), _COLUMNS), -1.0, dtype=dtype, device=device)
    return torch.cat((torch.stack([row.to(device) for row in rows]), missing)) if rows else missing
