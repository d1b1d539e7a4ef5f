"""One outcome on all ranks: what one rank, or each, did, or an error that every rank raises.

It knows process groups and Python objects, and no tensors. Without a process group there is one rank.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

__all__ = ["from_every_rank", "on_every_rank", "on_first_rank", "rank", "world_size"]

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
    """Every rank's value, which can be pickled, by rank."""
    values = [value]
    if dist.is_initialized():
        values = values * dist.get_world_size()
        dist.all_gather_object(values, value, group=group)
    return values


def _outcome(action: Callable[[], Any]) -> list[Any]:
    try:
        return [action(), None]
    except Exception as error:  # whatever it is, the other ranks are waiting
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return [None, RuntimeError(f"{type(error).__name__}: {error}")]
        return [None, error]
