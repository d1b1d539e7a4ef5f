"""What tests of expert-parallel parameters share."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def draw(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alone() -> dist.ProcessGroup:
    return [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
