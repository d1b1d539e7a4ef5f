"""Memory to read saved state into where the live optimizer has none, and whether the checkpoint covers what is read.

Works from a parameter and DCP's metadata; does not depend on the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from manic.distributed.layout import is_fsdp1, local_storage

__all__ = ["check_covered", "check_kind", "target_of"]

_WAY_OUT = "Load into a new optimizer, before its first step"


def target_of(there: Any, parameter: torch.Tensor, what: str, checkpoint: str) -> Any:
    """Where to read a saved entry of a parameter's state for which the live optimizer has no entry.

    Args:
        there: DCP's metadata of the entry.
        parameter: The live parameter.
        what: The entry in words.
        checkpoint: The checkpoint's name in messages.

    Returns:
        Zeros of the saved dtype: of the parameter's placements if the entry has its shape, else a plain tensor;
        ``None`` for an entry that is not a tensor.

    Raises:
        ValueError: if the layout of the entry cannot be derived from the parameter's.
    """
    if not isinstance(there, TensorStorageMetadata):
        return None
    size, dtype = tuple(there.size), there.properties.dtype
    is_managed = is_fsdp1(parameter)
    if size == tuple(parameter.shape) and not is_managed:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    if math.prod(size) == 1:
        return torch.zeros(size, dtype=dtype, device="cpu")
    if isinstance(parameter, DTensor) or is_managed:
        raise ValueError(
            f"{checkpoint} holds {what}, of shape {size}, and this run's optimizer has no state for it yet: how it is "
            f"sharded is not known. {_WAY_OUT}"
        )
    return torch.zeros(size, dtype=dtype, device=parameter.device)


def check_kind(state: str, flat: Mapping[str, Any], parameter: str, checkpoint: str) -> None:
    """Raise ValueError if other parameters have this state in a tensor subclass: zeros would be of another class."""
    for key, value in flat.items():
        if key.startswith("state.") and key.endswith(f".{state}") and isinstance(value, torch.Tensor):
            kind = type(local_storage(value))
            if kind not in (torch.Tensor, torch.nn.Parameter):
                raise ValueError(
                    f"{checkpoint} holds {state} of {parameter}, and this run's optimizer has no state for it yet: "
                    f"it would be of class {kind.__name__}, which is not created here. {_WAY_OUT}"
                )


def check_covered(entries: Iterable[str], saved: Mapping[str, Any], checkpoint: str) -> None:
    """Raise ValueError if the checkpoint does not hold all elements of the tensors among ``entries``."""
    for entry in entries:
        there = saved.get(entry)
        if not isinstance(there, TensorStorageMetadata):
            continue
        chunks = {(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in there.chunks}
        found, total = sum(math.prod(sizes) for _, sizes in chunks), math.prod(there.size)
        if found < total:
            raise ValueError(
                f"{checkpoint} is incomplete: it holds {found} of the {total} elements of {entry}. A rank had none of "
                "this state when it was saved; load another checkpoint"
            )
