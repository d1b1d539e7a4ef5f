"""The padding of DeepSpeed's ZeRO-3 partitions: memory that nothing has written, and that would count in |x|^2.

ZeRO-3 gives the optimizer flat tensors with this rank's partitions of all parameters. Where the ranks do not divide
a parameter, its last partition is longer than what is left of it. This module reads the attributes that DeepSpeed sets
on parameters and on its optimizers, and imports nothing of it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from manic.distributed.instances import instances_of

__all__ = ["clear_padding"]


def clear_padding(groups: Sequence[Mapping[str, Any]]) -> None:
    """Set the padding of this rank in flat tensors of ZeRO-3 to 0; other parameters are left alone.

    Args:
        groups: The optimizer's param groups.
    """
    module: Any = sys.modules.get("deepspeed.runtime.zero.stage3")
    if module is None:
        return
    held = {id(parameter) for group in groups for parameter in group["params"]}
    # No parameter refers to the optimizer that has partitioned it before its first step.
    for zero in instances_of(module.DeepSpeedZeroOptimizer_Stage3):
        for flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups):
            if id(flat) in held:
                _clear(flat, parameters)


@torch.no_grad()
def _clear(flat: Tensor, parameters: Sequence[Any]) -> None:
    """Clear one flat tensor, which has a partition of each parameter."""
    start = 0
    for parameter in parameters:
        size, rank = parameter.ds_tensor.ds_numel, dist.get_rank(parameter.ds_process_group)
        filled = min(max(parameter.ds_numel - size * rank, 0), size)
        flat[start + filled : start + size].zero_()
        start += size
