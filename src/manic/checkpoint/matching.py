"""Whether a checkpoint fits this run, and which of its entries to read.

Compares names, shapes and settings of the live state with the saved ones; reads no data and changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from manic.checkpoint.flat_state import flat_keys, split
from manic.distributed.collectives import rank
from manic.mechanic import Mechanic

__all__ = ["check_model", "check_same_settings", "wanted_of_object", "wanted_of_optimizer"]

logger = logging.getLogger(__name__)

_MECHANIC_KEYS = frozenset(Mechanic.STATE_KEYS)


def check_model(model: Mapping[str, Any], saved: Mapping[str, Any], names: set[str], checkpoint: str) -> None:
    """Raise ValueError if the checkpoint is of another model; ``names`` are the keys of the model on all ranks."""
    for name, value in model.items():
        for key in flat_keys(value, f"model.{name}"):
            if key not in saved:
                raise ValueError(f"{checkpoint} is of another model: it has no {key.removeprefix('model.')}")
        there = saved.get(f"model.{name}")
        size = None
        if isinstance(there, TensorStorageMetadata):
            size, dtype = tuple(there.size), there.properties.dtype
            if isinstance(value, torch.Tensor) and dtype != value.dtype and rank() == 0:
                logger.warning("%s holds %s in %s, the model in %s", checkpoint, name, dtype, value.dtype)
        if isinstance(value, torch.Tensor) and size != tuple(value.shape):
            raise ValueError(
                f"{checkpoint} is of another model: {name} has shape {size} in the checkpoint and "
                f"{tuple(value.shape)} in this model"
            )
    unknown = {key for key in saved if key.startswith("model.")} - names
    if unknown:
        first = min(unknown).removeprefix("model.")
        raise ValueError(f"{checkpoint} is of another model: this model has no {first}")


def wanted_of_optimizer(
    flat: Mapping[str, Any], saved: Mapping[str, Any], trainable: set[str], own_keys: frozenset[str], checkpoint: str
) -> dict[str, Any]:
    """Select the entries of the live optimizer's state to read from the checkpoint.

    A parameter without a gradient before the save has no saved state. Another optimizer skips Mechanic's saved state;
    the live optimizer must have all other saved state. Settings that are tensors are read into copies, so that an
    optimizer can refuse them.
    """
    parameters = {
        key.removeprefix("param_groups.").rsplit(".", 1)[0] for key in flat if key.startswith("param_groups.")
    }
    states = [key.removeprefix("optimizer.state.") for key in saved if key.startswith("optimizer.state.")]
    have_state = {split(state, parameters)[0] for state in states}
    for path in states:
        parameter, state = split(path, parameters)
        if parameter in trainable and f"state.{path}" not in flat and state not in own_keys | _MECHANIC_KEYS:
            raise ValueError(
                f"{checkpoint} is of another optimizer or other options: it has {state} for {parameter}, this run's "
                "optimizer has none (if it has taken steps, load before the first)"
            )
    wanted = {}
    for key, value in flat.items():
        there = saved.get(f"optimizer.{key}")
        if key.startswith("param_groups."):
            if isinstance(value, torch.Tensor) and isinstance(there, TensorStorageMetadata):
                wanted[key] = torch.empty(there.size, dtype=there.properties.dtype, device=value.device)
            elif there is not None:
                wanted[key] = value.clone() if isinstance(value, torch.Tensor) else value
            continue
        parameter, state = split(key.removeprefix("state."), parameters)
        if parameter not in have_state or (there is None and state in own_keys):
            continue
        if there is None:
            raise ValueError(
                f"{checkpoint} is of another optimizer or other options: it has no {state} for {parameter}"
            )
        size = tuple(there.size) if isinstance(there, TensorStorageMetadata) else None
        expected = tuple(value.shape) if isinstance(value, torch.Tensor) else None
        if size != expected:
            raise ValueError(
                f"{checkpoint} is of another optimizer: {state} of {parameter} is "
                f"{'a number' if size is None else f'of shape {size}'} in the checkpoint and "
                f"{'a number' if expected is None else f'of shape {expected}'} in this run"
            )
        wanted[key] = value
    return wanted


def wanted_of_object(name: str, live: Any, saved: Mapping[str, Any], checkpoint: str) -> Any:
    """Select the entries of an object's state to read: the whole state as one value, or the live state's entries."""
    if f"objects.{name}" in saved:
        return (None,)
    there = {key for key in saved if key.startswith(f"objects.{name}.")}
    if not there:
        raise ValueError(f"{checkpoint} was saved without {name!r}; pass Checkpointer the objects of the save")
    live = live[0] if isinstance(live, tuple) else live
    here = set(flat_keys(live, f"objects.{name}"))
    if here != there:
        raise ValueError(f"{checkpoint} has another state of {name!r}: only one of them has {min(here ^ there)}")
    return live


def check_same_settings(first: Mapping[str, Any], other: Mapping[str, Any], checkpoint: str) -> None:
    """Raise ValueError if two parameters of one live param group have different saved settings."""
    for key in (first.keys() | other.keys()) - {"params"}:
        one, two = first.get(key), other.get(key)
        tensors = isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor)
        if not (torch.equal(cast(torch.Tensor, one), cast(torch.Tensor, two)) if tensors else one == two):
            raise ValueError(
                f"{checkpoint} has other param groups: there {first['params'][0]} has {key} {one} and "
                f"{other['params'][0]} has {two}; in this run they share a group"
            )
