"""Whether names are as a checkpoint needs them: each parameter of an optimizer has one, and each has one value.

DCP takes tensors of one name on several ranks for shards or replicas of one tensor, and saves each element once.
"""

from __future__ import annotations

import math
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from manic.checkpoint.flat_state import parameter_names
from manic.distributed.collectives import from_every_rank, on_every_rank, world_size
from manic.distributed.layout import is_expert_parallel, is_fsdp1
from manic.distributed.parts import plain_parts
from manic.distributed.rows import moments_of

__all__ = ["check_in_model", "check_one_value_of_each_name"]

# Replicas may differ in their last bits; in low precision, those are more than this.
_TOLERANCE = 1e-3

Place = tuple[int, tuple[int, ...]]
"""Number of ranks that hold a tensor together, and this rank's coordinate among them."""

Described = tuple[Place, tuple[int, ...], float, dict[str, list[float]]]
"""Place, shape and tolerance of a parameter, and sums of it and of its state."""


def check_in_model(model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Raise ValueError if an optimizer has a parameter that the model does not have: it has no name then.

    FSDP2's parameters are sharded afterwards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward pass alone the root still has whole parameters, not the optimizer's
    known = {id(parameter) for parameter in model.parameters()}
    for optimizer in optimizers:
        for parameter in (parameter for each in optimizer.param_groups for parameter in each["params"]):
            if id(parameter) not in known:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} of the optimizer is not in the model: build the "
                    "optimizer from this model's parameters, after the model is wrapped, or give Checkpointer a model "
                    "that has it"
                )


def check_one_value_of_each_name(
    model: nn.Module, optimizers: Sequence[Optimizer], flat: Mapping[str, Any], group: ProcessGroup | None
) -> None:
    """Refuse to save parameters of one name that differ between ranks, for example each rank's experts.

    Looks at parameters that are sharded over a part of the ranks, and at plain ones that a param group declares
    expert-parallel; of the latter at their state, too, for they may begin with equal values.

    Args:
        model: The model.
        optimizers: Its optimizers.
        flat: Their state.
        group: A group of all ranks; ``None``: the default group.

    Raises:
        ValueError: on every rank, if there is one; it has the name.
    """
    if world_size() == 1:
        return
    groups = [each for optimizer in optimizers for each in optimizer.param_groups]
    declared = {id(parameter) for each in groups if is_expert_parallel(each) for parameter in each["params"]}
    names, fsdp1 = parameter_names(model), _places_of_fsdp1(model)
    found = {
        names[id(parameter)]: (parameter, place)
        for parameter in model.parameters()
        if (place := _place(parameter, fsdp1, id(parameter) in declared)) is not None and place[0] < world_size()
    }
    marks = {name: zlib.crc32(name.encode()) for name in found}
    held = Counter[int]()
    for each in from_every_rank(array("L", sorted(set(marks.values()))).tobytes(), group):
        held.update(array("L", each))

    def describe() -> dict[str, Described]:
        return {
            name: _described(name, parameter, place, flat if id(parameter) in declared else {})
            for name, (parameter, place) in found.items()
            if held[marks[name]] > place[0]  # other stages of a pipeline have other names
        }

    if not held:
        return
    everyones = from_every_rank(on_every_rank(describe, group), group)
    first: dict[tuple[str, Place], tuple[int, Described]] = {}
    for rank, rows in enumerate(everyones):
        for name, mine in rows.items():
            other, theirs = first.setdefault((name, mine[0]), (rank, mine))
            if what := _difference(theirs, mine):
                raise ValueError(
                    f"not saved: {name} has other {what} on rank {other} and rank {rank}, and a checkpoint has one "
                    "entry of each name: give the experts of each rank names of their own, or shard them as DTensors "
                    "over all ranks"
                )


def _places_of_fsdp1(model: nn.Module) -> dict[int, Place]:
    """By the ``id`` of a parameter that FSDP1 manages: the place in its process group."""
    places: dict[int, Place] = {}
    for module in model.modules():  # inner modules after outer ones
        if isinstance(module, FullyShardedDataParallel) and (group := module.process_group) is not None:
            places.update(dict.fromkeys(map(id, module.parameters()), (group.size(), (group.rank(),))))
    return places


def _place(parameter: Tensor, fsdp1: Mapping[int, Place], is_declared: bool) -> Place | None:
    """Where this rank's part of a parameter is; ``None``: it holds none, or a replica as any other rank does."""
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        coordinate = mesh.get_coordinate()
        return None if coordinate is None else (mesh.size(), tuple(coordinate))
    if is_fsdp1(parameter):
        return fsdp1.get(id(parameter))
    return (1, ()) if is_declared else None


def _described(name: str, parameter: Tensor, place: Place, flat: Mapping[str, Any]) -> Described:
    prefix = f"state.{name}."
    state = {
        key.removeprefix(prefix): value
        for key, value in flat.items()
        if key.startswith(prefix) and isinstance(value, Tensor) and value.shape == parameter.shape
    }
    sums = {"values": _sums(parameter)}
    if not is_fsdp1(parameter):  # whose state dict has other tensors than the optimizer
        sums.update({f"{key} in its optimizer": _sums(value) for key, value in state.items()})
    tolerance = max(_TOLERANCE, 8 * torch.finfo(parameter.dtype).eps) if parameter.is_floating_point() else _TOLERANCE
    return place, tuple(parameter.shape), tolerance, sums


@torch.no_grad()
def _sums(tensor: Tensor) -> list[float]:
    """The moments of this rank's part of a tensor: the sum of squares, and sums with weights."""
    dtype = torch.float32 if tensor.device.type == "mps" else torch.float64
    parts = [moments_of(part, dtype).to("cpu", torch.float64) for part in plain_parts(tensor)]
    return torch.stack(parts).sum(dim=0).tolist() if parts else []


def _difference(one: Described, two: Described) -> str:
    """What differs between two ranks' parts of one place, in words; empty: nothing."""
    _, shape, tolerance, sums = one
    _, other_shape, _, other_sums = two
    if shape != other_shape:
        return "shapes"
    for what in (each for each in sums if each in other_sums):  # of experts without tokens there is no state
        mine, theirs = sums[what], other_sums[what]
        is_known = all(map(math.isfinite, mine))
        if is_known != all(map(math.isfinite, theirs)):
            return what
        square = max([*mine[:1], *theirs[:1]], default=0.0)
        limits = [tolerance * square, *[tolerance * math.sqrt(square)] * (len(mine) - 1)]
        if is_known and any(abs(a - b) > limit for a, b, limit in zip(mine, theirs, limits)):
            return what
    return ""
