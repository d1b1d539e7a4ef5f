"""The padding of DeepSpeed's ZeRO-3 partitions: memory that nothing has written, and that would count in |x|^2.

ZeRO-3 gives the optimizer one flat tensor with this rank's partitions of all parameters. Where the ranks do not divide
a parameter, its last partition is longer than what is left of it. This module reads the attributes that DeepSpeed sets
on parameters, and imports nothing of it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from manic.distributed.collectives import raise_together
from manic.distributed.instances import instances_of

__all__ = ["clear_padding"]


def clear_padding(groups: Sequence[Mapping[str, Any]], group: ProcessGroup | None, device: torch.device) -> None:
    """Set the padding of this rank to 0, if ZeRO-3 has partitioned the model. Every rank must call it.

    With several flat tensors nothing is done: they are stepped one by one, which is refused.

    Args:
        groups: The optimizer's param groups.
        group: The process group, or ``None`` for this process alone.
        device: A device that the group's backend supports.

    Raises:
        ValueError: on every rank alike, if padding cannot be told from parameters.
    """
    raise_together(ValueError, _clear(groups) if "deepspeed" in sys.modules else "", group, device)


@torch.no_grad()
def _clear(groups: Sequence[Mapping[str, Any]]) -> str:
    """Why it cannot be done, in words; empty if it is done, or there is none."""
    # No reference is kept to them: the optimizer has flat tensors in their place, and torch may swap them.
    parameters: list[Any] = [each for each in instances_of(nn.Parameter) if hasattr(each, "ds_tensor")]
    managed = sorted((each for each in parameters if each.requires_grad), key=lambda each: int(each.ds_id))
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
