"""Counts what a step asks of torch: operators and the bytes that they move, collectives, and host syncs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["CallCounter"]


class CallCounter(TorchDispatchMode):
    """Counts collectives, host syncs and other operators while the mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # the mode is called again for the local tensors
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts["collectives"] += 1
        elif func is torch.ops.aten._local_scalar_dense.default:
            self.counts["syncs"] += 1
        elif not func.is_view and func is not torch.ops.aten.detach.default:
            self.counts["operators"] += 1
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.namespace == "aten":
            self.counts["bytes"] += _moved(func, args, kwargs or {}, result)
        return result


def _moved(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes that an operator reads and writes: of all its tensors, and once more of those that it changes."""
    arguments = dict(zip((each.name for each in func._schema.arguments), args)) | kwargs
    total, known = 0, set[int]()
    for each in func._schema.arguments:
        leaves = [leaf for leaf in tree_leaves(arguments.get(each.name)) if isinstance(leaf, Tensor)]
        # An operand that is there twice, as in an inner product with itself, is read once.
        tensors = [leaf for leaf in leaves if leaf.data_ptr() not in known]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        known.update(leaf.data_ptr() for leaf in leaves)
        is_written = each.alias_info is not None and each.alias_info.is_write
        is_read = not (is_written and (each.is_out or func.overloadpacket is torch.ops.aten.copy_))
        if func.overloadpacket is torch.ops.aten._foreach_copy_:
            is_read = not is_written
        # A fused kernel writes gradients only if it unscales them.
        is_written &= each.name != "grads"
        total += size * (is_read + is_written)
    made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.data_ptr() not in known]
    return total + sum(tensor.numel() * tensor.element_size() for tensor in made)
