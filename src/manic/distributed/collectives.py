"""Actions with one outcome on all ranks: a result, or an error that every rank raises.

Without an initialised ``torch.distributed`` there is one rank.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = [
    "from_every_rank", "gather", "is_simulated", "on_any_rank", "on_every_rank", "on_first_rank", "raise_together",
    "rank", "world_size",
]  # fmt: skip

T = TypeVar("T")


def rank() -> int:
    """This process's rank in the default group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks in the default group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_first_rank(action: Callable[[], T], group: ProcessGroup | None = None) -> T:
    """Call ``action`` on rank 0; return its result, or raise its error, on every rank.

    Args:
        action: Returns a picklable value. Must not communicate.
        group: A group of all ranks; ``None``: the default group.

    Returns:
        Rank 0's result.
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
    """Call ``action`` on every rank; if any fails, raise the error of the lowest failed rank on every rank.

    Args:
        action: The action. If it communicates, a failed rank leaves the others waiting.
        group: A group of all ranks; ``None``: the default group.

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
    """Gather one value from every rank.

    Args:
        value: This rank's value; picklable.
        group: The group to gather over; ``None``: the default group.

    Returns:
        The values, by rank.
    """
    values = [value]
    if dist.is_initialized():
        values = values * dist.get_world_size(group)
        dist.all_gather_object(values, value, group=group)
    return values


def gather(row: Tensor, group: ProcessGroup) -> list[Tensor]:
    """Gather ``row``, of the same shape on all ranks, to host memory; faster than :func:`from_every_rank`."""
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, row, group=group)
    return list(torch.stack(rows).cpu().unbind())


def is_simulated(group: ProcessGroup) -> bool:
    """Whether torch's ``"fake"`` backend simulates the other ranks and moves no data (torchtitan's dry runs use it)."""
    return dist.get_backend(group) == "fake"


def on_any_rank(flag: bool, group: ProcessGroup | None, device: torch.device) -> bool:
    """Whether ``flag`` is true on any rank of ``group``; ``None``: of this process alone.

    Args:
        flag: This rank's.
        group: The process group; a simulated one has no other rank's.
        device: A device that the group's backend supports.
    """
    if group is None or is_simulated(group):
        return flag
    return any(int(each) for each in gather(torch.tensor(flag, dtype=torch.uint8, device=device), group))


def raise_together(kind: type[Exception], problem: str, group: ProcessGroup | None, device: torch.device) -> None:
    """Raise on every rank if any rank has a problem.

    Args:
        kind: The type of the error.
        problem: This rank's problem in words; empty: none.
        group: The process group, or ``None`` for this process alone.
        device: A device that the group's backend supports.
    """
    if group is None or is_simulated(group):
        if problem:
            raise kind(problem)
        return
    lengths = gather(torch.tensor([len(problem)], device=device), group)
    if any(length[0] for length in lengths):
        everyone = from_every_rank(problem, group)
        first = next(index for index, text in enumerate(everyone) if text)
        raise kind(f"rank {first}: {everyone[first]}")


def _outcome(action: Callable[[], Any]) -> list[Any]:
    try:
        return [action(), None]
    except Exception as error:  # any type: the other ranks wait for the outcome
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return [None, RuntimeError(f"{type(error).__name__}: {error}")]
        return [None, error]
