"""The padding of DeepSpeed's ZeRO-3 partitions: memory that nothing has written, and that would count in |x|^2.

ZeRO-3 gives the optimizer one flat tensor with this rank's partitions of all parameters. Where the ranks do not divide
a parameter, its last partition is longer than what is left of it. This module reads the attributes that DeepSpeed sets
on the parameters that the optimizer was built with, and imports nothing of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Zero3Padding"]


class Zero3Padding:
    """Sets padding to 0, once the optimizer holds flat tensors.

    Args:
        optimizers: The base optimizers, with the parameters that they were built with.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        held = [parameter for base in optimizers for group in base.param_groups for parameter in group["params"]]
        self._originals = [weakref.ref(parameter) for parameter in held]

    def __getstate__(self) -> dict[str, Any]:
        return {"_originals": []}  # a copy of the optimizer is of other parameters

    @property
    def managed(self) -> list[Any]:
        """The parameters that ZeRO-3 has partitioned, in the optimizer's order."""
        found = (reference() for reference in self._originals)
        return [each for each in found if each is not None and hasattr(each, "ds_tensor") and each.requires_grad]

    @torch.no_grad()
    def clear(self, groups: Sequence[Mapping[str, Any]]) -> str:
        """Set the padding of this rank to 0.

        Args:
            groups: The optimizer's param groups. With several flat tensors nothing is done: they are stepped one by
                one, which is refused.

        Returns:
            Why it cannot be done, in words; empty if it is done, or there is none.
        """
        managed, held = self.managed, [parameter for group in groups for parameter in group["params"]]
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
