"""State of sharded parameters that some ranks lack, because their shard never had a gradient: completed for a save.

Torch's checkpoints hold every element of a tensor or none. A rank of an expert layer may have had no tokens so far.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from manic.distributed.collectives import from_every_rank, on_every_rank
from manic.optimizer.names import REFERENCES
from manic.optimizer.references import is_of_sample, new_reference

__all__ = ["complete_shards"]


def complete_shards(flat: dict[str, Any], parameters: Mapping[str, Tensor], group: ProcessGroup | None) -> None:
    """Add to ``flat`` the shards that this rank lacks and others have: of references the parameter's, of others zeros.

    That is the state after gradients of zero. Of entries that are not sharded, such as Adam's number of steps, the
    other ranks' is saved.

    Args:
        flat: The state of this rank's optimizers.
        parameters: Their parameters, by name.
        group: A group of all ranks; ``None``: the default group.

    Raises:
        ValueError: on every rank, if a rank lacks a sharded entry that does not have the parameter's shape.
    """
    sharded = {name: parameter for name, parameter in parameters.items() if isinstance(parameter, DTensor)}
    states: dict[str, dict[str, Any]] = {name: {} for name in sharded}
    for key, value in flat.items():
        name, _, state = key.removeprefix("state.").rpartition(".")
        if key.startswith("state.") and name in states:
            states[name][state] = value
    # Few bytes from each rank: of large models there are thousands of parameters, of which usually none differs.
    marks = array("L", (zlib.crc32(",".join(sorted(each)).encode()) for each in states.values()))
    rows = from_every_rank((zlib.crc32(",".join(sharded).encode()), marks.tobytes()), group)
    if len(set(rows)) == len({names for names, _ in rows}):
        return  # ranks with the same parameters have the same state of them
    described = {name: {state: _describe(value) for state, value in each.items()} for name, each in states.items()}
    known: dict[str, dict[str, Any]] = {}
    for each in from_every_rank(described, group):
        for name, theirs in each.items():
            known.setdefault(name, {}).update(theirs)

    def complete() -> None:
        for name, parameter in sharded.items():
            for state in known[name].keys() - states[name].keys():
                description = known[name][state]
                if description is None:
                    continue
                shape, dtype = description
                of_sample = state in REFERENCES and is_of_sample(parameter, shape)
                if shape != tuple(parameter.shape) and not of_sample:
                    raise ValueError(
                        f"not saved: this rank has no {state} of {name}, since its shard never had a gradient, and "
                        f"{state}, of shape {shape}, cannot be made for it. Give the parameter a gradient of zeros"
                    )
                flat[f"state.{name}.{state}"] = (
                    new_reference(parameter, dtype, of_sample=of_sample)
                    if state in REFERENCES
                    else torch.zeros_like(parameter, dtype=dtype).detach()
                )

    on_every_rank(complete, group)


def _describe(value: Any) -> tuple[tuple[int, ...], torch.dtype] | None:
    """Shape and dtype of a sharded entry; ``None`` for another, of which one rank's is saved."""
    return (tuple(value.shape), value.dtype) if isinstance(value, DTensor) else None
