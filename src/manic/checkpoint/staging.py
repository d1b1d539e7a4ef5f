"""Copies of a run's state in host memory, from which another thread can write while training goes on.

It knows tensors and the memory that their copies take, and nothing of files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.staging import AsyncStager, BlockingAsyncStager, DefaultStager, StagingOptions

__all__ = ["Staging"]


class Staging:
    """Host memory for one copy, taken for the first and kept for the next.

    Args:
        has_sharded_tensors: Whether the state holds FSDP1's ShardedTensors.
    """

    def __init__(self, has_sharded_tensors: bool) -> None:
        self._stager: AsyncStager
        if has_sharded_tensors:
            self._stager = BlockingAsyncStager()  # the other knows no ShardedTensor
        else:
            cuda = torch.cuda.is_available()
            options = StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
            )
            self._stager = DefaultStager(options)

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """A copy of ``state``, which the next one is written over."""
        staged: dict[str, Any] = self._stager.stage(state)  # type: ignore[assignment]
        return staged
