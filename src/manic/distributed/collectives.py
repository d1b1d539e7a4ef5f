"""One outcome on all ranks: what one rank, or each, did, or an error that every rank raises.

It knows process groups, and nothing of what ranks hold. Where torch.distributed is not initialised there is one rank.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = ["from_every_rank", "gather", "on_every_rank", "on_first_rank", "raise_together", "rank", "world_size"]

T = TypeVar("T")


def rank() -> int:
    """This process's rank among all."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_first_rank(action: Callable[[], T], group: ProcessGroup | None = None) -> T:
    """Do it on rank 0; its result, or its error, is every rank's.

    Args:
        action: Gives something that can be pickled. Must not communicate.
        group: Of all ranks; default: the default group.
    """
    box: list[Any] = [None, None]
    if rank() == 0:
        box = _outcome(action)
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0, group=group)
    if box[1] is not None:
        raise box[1]
    result: T = box[0]
    return result


def on_every_rank(action: Callable[[], T], group: ProcessGroup | None = None) -> T:
    """Do it on every rank; the lowest failed rank's error is every rank's.

    Args:
        action: What to do. If it communicates, a rank that fails leaves the others waiting.
        group: Of all ranks; default: the default group.

    Returns:
        This rank's result.
    """
    result, error = _outcome(action)
    for each in from_every_rank(error, group):
        if each is not None:
            raise each
    mine: T = result
    return mine


def from_every_rank(value: T, group: ProcessGroup | None = None) -> list[T]:
    """Every rank's value, which can be pickled, by rank.

    Args:
        value: This rank's.
        group: The ranks; default: the default group.
    """
    values = [value]
    if dist.is_initialized():
        values = values * dist.get_world_size(group)
        dist.all_gather_object(values, value, group=group)
    return values


def gather(row: Tensor, group: ProcessGroup) -> list[Tensor]:
    """Every rank's ``row``, which has one shape on all of them, on the host; faster than :func:`from_every_rank`."""
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, row, group=group)
    return list(torch.stack(rows).cpu().unbind())


def raise_together(kind: type[Exception], complaint: str, group: ProcessGroup | None, device: torch.device) -> None:
    """Raise on every rank if any rank has something to complain of.

    Args:
        kind: What to raise.
        complaint: This rank's, in words; empty: none.
        group: The process group, or ``None`` for this process alone.
        device: Where the group's backend takes tensors from.
    """
    if group is None:
        if complaint:
            raise kind(complaint)
        return
    lengths = gather(torch.tensor([len(complaint)], device=device), group)
    if any(length[0] for length in lengths):
        everyone = from_every_rank(complaint, group)
        first = next(index for index, text in enumerate(everyone) if text)
        raise kind(f"rank {first}: {everyone[first]}")


def _outcome(action: Callable[[], Any]) -> list[Any]:
    try:
        return [action(), None]
    except Exception as error:  # whatever it is, the other ranks are waiting
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return [None, RuntimeError(f"{type(error).__name__}: {error}")]
        return [None, error]
