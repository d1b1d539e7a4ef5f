"""Copies of a run's state in host memory, which another thread writes while training continues.

Handles tensors and the memory of their copies, not files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.staging import AsyncStager, BlockingAsyncStager, DefaultStager, StagingOptions

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
        """Copy ``state``; the next call overwrites the copy."""
        staged: dict[str, Any] = self._stager.stage(state)  # type: ignore[assignment]
        return staged
