"""The pieces in which a pass over many tensors goes: each element is read from memory once, in few calls.

It knows sizes, devices and how tensors lie in memory, and nothing of what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

__all__ = ["Scratch", "batched", "lie_side_by_side", "pieces"]

# Elements worked on at a time. On a CPU the operands of one piece stay in the last cache, so that several operations
# cost one pass over memory; elsewhere a piece bounds the scratch and is large enough to fill the device.
CPU_PIECE = 1 << 20
DEVICE_PIECE = 1 << 24
# Tensors of at most so many elements are copied together to be worked on: calls cost more than copies.
SMALL = 1 << 17
# Elements of such a copy, at most.
_BATCH = 1 << 19

T = TypeVar("T")


def batched(items: Iterable[T], size_of: Callable[[T], int], kind_of: Callable[[T], Hashable]) -> list[list[T]]:
    """Group what can be worked on together.

    Args:
        items: Things with a tensor each.
        size_of: Gives its number of elements.
        kind_of: Items of different kinds stay apart.

    Returns:
        Every item once: small ones in lists of at most 2**19 elements, each of the others alone.
    """
    batches: list[list[T]] = []
    fillable: dict[Hashable, tuple[list[T], int]] = {}
    for item in items:
        size = size_of(item)
        if size > SMALL:
            batches.append([item])
            continue
        kind = kind_of(item)
        batch, room = fillable.get(kind, (None, 0))
        if batch is None or room < size:
            batch, room = [], _BATCH
            batches.append(batch)
        batch.append(item)
        fillable[kind] = batch, room - size
    return batches


def pieces(
    *columns: Sequence[Tensor | None], written: Sequence[int] = (), in_place: bool = False
) -> Iterator[tuple[Any, ...]]:
    """Walk through tensors side by side.

    Args:
        columns: Sequences of one length. Tensors at the same place of each have one shape; a column may be all None.
        written: Numbers of the columns that the caller changes in place.
        in_place: Whether columns of several may be written where they are, so that an interrupt leaves some written.

    Yields:
        A tuple as long as ``columns``. A lone tensor comes in pieces that are views of it, flat ones if it is
        contiguous in every column, split along its first dimension otherwise. Several come as one flat tensor: a view
        where they lie side by side in memory, else a copy. Of ``written`` columns it is a copy unless ``in_place``, and
        is copied back when the next piece is asked for.
    """
    if len(columns[0]) > 1:
        flat = [_joined(column, may_be_view=in_place or index not in written) for index, column in enumerate(columns)]
        yield tuple(None if each is None else each[0] for each in flat)
        for index in written:
            if (source := flat[index]) is not None and source[1]:
                torch._foreach_copy_(columns[index], _unflatten(source[0], columns[index]))  # type: ignore[arg-type]
        return
    row = [column[0] for column in columns]
    present = [tensor for tensor in row if tensor is not None]
    size, total = _piece_size(present[0]), present[0].numel()
    if total == 0:
        return
    if not all(tensor.is_contiguous() for tensor in present):
        if total <= size:
            yield tuple(row)
            return
        rows = max(1, size * present[0].shape[0] // total)
        yield from zip(*(repeat(None) if tensor is None else torch.split(tensor, rows) for tensor in row))
        return
    row = [None if tensor is None else tensor.view(-1) for tensor in row]
    if total <= size:
        yield tuple(row)
        return
    for start in range(0, total, size):
        yield tuple(None if tensor is None else tensor[start : start + size] for tensor in row)


class Scratch:
    """Memory for a piece, kept from one to the next: fresh pages cost more than what is written on them."""

    def __init__(self) -> None:
        self._kept: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, piece: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of ``piece``'s shape and device, contiguous; what it held before is lost."""
        key = piece.device, dtype
        if key not in self._kept or self._kept[key].numel() < piece.numel():
            self._kept[key] = torch.empty(piece.numel(), dtype=dtype, device=piece.device)
        return self._kept[key][: piece.numel()].view(piece.shape)


def _joined(column: Sequence[Tensor | None], *, may_be_view: bool) -> tuple[Tensor, bool] | None:
    """Many tensors as a flat one, and whether it is a copy; ``None`` for none."""
    if column[0] is None:
        return None
    tensors: Sequence[Tensor] = column  # type: ignore[assignment]
    first = tensors[0]
    if may_be_view and lie_side_by_side(tensors):
        return first.as_strided((sum(map(Tensor.numel, tensors)),), (1,)), False
    if first.is_contiguous():
        return _flatten(tensors), True
    flat = torch.empty(sum(map(Tensor.numel, tensors)), dtype=first.dtype, device=first.device)
    torch._foreach_copy_(_unflatten(flat, tensors), list(tensors))
    return flat, True


def lie_side_by_side(tensors: Sequence[Tensor]) -> bool:
    """Whether contiguous tensors follow each other in one storage, so that one flat view has them all."""
    first, last = tensors[0], tensors[-1]
    place, size = first.data_ptr(), first.element_size()
    for tensor in tensors:
        if tensor.data_ptr() != place or not tensor.is_contiguous():
            return False
        place += tensor.numel() * size
    return first.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()


# torch has no public function that copies many tensors into one, or back, in few calls; DDP and torch.optim use these.
def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call, no-any-return]


def _unflatten(flat: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return _unflatten_dense_tensors(flat, tensors)  # type: ignore[no-untyped-call, no-any-return]


def _piece_size(tensor: Tensor) -> int:
    return CPU_PIECE if tensor.is_cpu else DEVICE_PIECE
