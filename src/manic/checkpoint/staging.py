"""Copies of a run's state in host memory, which another thread writes while training continues.

Handles tensors and the memory of their copies, not files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import AsyncStager, BlockingAsyncStager, DefaultStager, StagingOptions

from manic.distributed.layout import local_storage

__all__ = ["Staging"]


class Staging:
    """Host memory for one copy, allocated by the first and reused by the next.

    Args:
        has_sharded_tensors: Whether the state holds FSDP1's ShardedTensors.
    """

    def __init__(self, has_sharded_tensors: bool) -> None:
        self._stager: AsyncStager
        if has_sharded_tensors:
            self._stager = BlockingAsyncStager()  # DefaultStager does not support ShardedTensor
        else:
            cuda = torch.cuda.is_available()
            options = StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
            )
            self._stager = DefaultStager(options)

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """Copy ``state``; the next call overwrites the copy, apart from tensors of subclasses."""
        plain = _without_subclasses(state)
        staged: dict[str, Any] = self._stager.stage(plain)  # type: ignore[assignment]
        return _with_copies(state, staged)


def _is_subclass(value: Any) -> bool:
    """Whether ``value`` is, or is sharded from, a tensor subclass, which may lack the operations that staging takes."""
    return isinstance(value, Tensor) and hasattr(local_storage(value), "__tensor_flatten__")


def _without_subclasses(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_subclasses(value) if isinstance(value, dict) else value
        for key, value in state.items()
        if not _is_subclass(value)
    }


def _with_copies(state: dict[str, Any], staged: dict[str, Any]) -> dict[str, Any]:
    """``staged``, with copies of what it lacks of ``state``."""
    return {
        key: _with_copies(value, staged[key])
        if isinstance(value, dict)
        else staged[key]
        if key in staged
        else _copy(value)
        for key, value in state.items()
    }


def _copy(tensor: Any) -> Any:
    """A copy in host memory, of a subclass by the tensors inside of it, which may have other things beside them."""
    if not isinstance(tensor, Tensor):
        return tensor
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.detach().to("cpu", copy=True)
    names, context = tensor.__tensor_flatten__()
    inside = {name: _copy(getattr(tensor, name)) for name in names}
    return type(tensor).__tensor_unflatten__(inside, context, tensor.size(), tensor.stride())  # type: ignore[attr-defined]
