"""The padding of DeepSpeed's ZeRO-3 partitions: memory that nothing has written, and that would count in |x|^2.

ZeRO-3 gives the optimizer one flat tensor with this rank's partitions of all parameters. Where the ranks do not divide
a parameter, its last partition is longer than what is left of it. This module reads the attributes that DeepSpeed sets
on parameters, and imports nothing of it.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["clear_padding", "partitioned"]


def partitioned() -> list[Any]:
    """The trainable parameters of this process that ZeRO-3 has partitioned, in the order of their modules.

    They are found among all objects: the optimizer has flat tensors in their place, and must not keep them alive.
    """
    if "deepspeed" not in sys.modules:
        return []
    parameters = [each for each in gc.get_objects() if issubclass(type(each), torch.nn.Parameter)]
    managed: list[Any] = [each for each in parameters if hasattr(each, "ds_tensor") and each.requires_grad]
    return sorted(managed, key=lambda each: int(each.ds_id))


@torch.no_grad()
def clear_padding(managed: Sequence[Any], groups: Sequence[Mapping[str, Any]]) -> str:
    """Set the padding of this rank to 0.

    Args:
        managed: From :func:`partitioned`.
        groups: The optimizer's param groups. With several flat tensors nothing is done: they are stepped one by one,
            which is refused.

    Returns:
        Why it cannot be done, in words; empty if it is done, or there is none.
    """
    held = [parameter for group in groups for parameter in group["params"]]
    sizes = [parameter.ds_tensor.ds_numel for parameter in managed]
    if len(held) != 1 or held[0].numel() != sum(sizes):
        return ""
    (flat,) = held
    start, padding = 0, list[Tensor]()
    for parameter, size in zip(managed, sizes):
        rank = dist.get_rank(parameter.ds_process_group)
        filled = min(max(parameter.ds_numel - size * rank, 0), size)
        part, partition = flat.detach()[start : start + size], parameter.ds_tensor.detach()
        if partition.numel() == size and not torch.equal(part[:filled], partition[:filled].to(part)):
            return (
                "DeepSpeed's ZeRO-3 has its partitions in another order than the optimizer its parameters, so that "
                "padding cannot be told from parameters: build the optimizer with list(model.parameters())"
            )
        padding.append(part[filled:])
        start += size
    for part in padding:
        part.zero_()
    return ""
