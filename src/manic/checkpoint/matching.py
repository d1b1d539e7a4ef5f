"""Whether a checkpoint is of this run, and what to ask it for.

It compares the live state's names, shapes and settings with those that were saved; it reads and changes nothing.
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

__all__ = ["check_alike", "check_model", "wanted_of_object", "wanted_of_optimizer"]

logger = logging.getLogger(__name__)

_MECHANIC_KEYS = frozenset(Mechanic.STATE_KEYS)


def check_model(model: Mapping[str, Any], saved: Mapping[str, Any], names: set[str], checkpoint: str) -> None:
    """Raise ValueError if the checkpoint is of another model; ``names`` are the keys of the whole model."""
    for name, value in model.items():
        for key in flat_keys(value, f"model.{name}"):
            if key not in saved:
                raise ValueError(f"{checkpoint} was saved from another model: it has no {key.removeprefix('model.')}")
        there = saved.get(f"model.{name}")
        size = None
        if isinstance(there, TensorStorageMetadata):
            size, dtype = tuple(there.size), there.properties.dtype
            if isinstance(value, torch.Tensor) and dtype != value.dtype and rank() == 0:
                logger.warning("%s holds %s in %s, the model in %s", checkpoint, name, dtype, value.dtype)
        if isinstance(value, torch.Tensor) and size != tuple(value.shape):
            raise ValueError(
                f"{checkpoint} was saved from another model: {name} has shape {size} there and "
                f"{tuple(value.shape)} in this model"
            )
    unknown = {key for key in saved if key.startswith("model.")} - names
    if unknown:
        first = min(unknown).removeprefix("model.")
        raise ValueError(f"{checkpoint} was saved from another model: this one has no {first}")


def wanted_of_optimizer(
    flat: Mapping[str, Any], saved: Mapping[str, Any], trainable: set[str], own_keys: frozenset[str], checkpoint: str
) -> dict[str, Any]:
    """What to ask the checkpoint for, of what the live optimizer's state holds.

    A parameter that had no gradient before the save has no state there, and what only Mechanic has, others do without;
    any other state that is there must be wanted here. Settings that are tensors are read into copies, so that an
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
                f"{checkpoint} was saved from another optimizer, or one with other options: it has {state} for "
                f"{parameter}, this run's optimizer has none (if it took steps, load before the first)"
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
                f"{checkpoint} was saved from another optimizer, or one with other options: it has no {state} for "
                f"{parameter}"
            )
        size = tuple(there.size) if isinstance(there, TensorStorageMetadata) else None
        expected = tuple(value.shape) if isinstance(value, torch.Tensor) else None
        if size != expected:
            raise ValueError(
                f"{checkpoint} was saved from another optimizer: {state} of {parameter} is "
                f"{'a number' if size is None else f'of shape {size}'} there and "
                f"{'a number' if expected is None else f'of shape {expected}'} in this run"
            )
        wanted[key] = value
    return wanted


def wanted_of_object(name: str, live: Any, saved: Mapping[str, Any], checkpoint: str) -> Any:
    """What to ask the checkpoint for: the whole state, or tensor by tensor what the live one holds."""
    if f"objects.{name}" in saved:
        return (None,)
    there = {key for key in saved if key.startswith(f"objects.{name}.")}
    if not there:
        raise ValueError(f"{checkpoint} was saved without {name!r}; give Checkpointer the same objects as then")
    live = live[0] if isinstance(live, tuple) else live
    here = set(flat_keys(live, f"objects.{name}"))
    if here != there:
        raise ValueError(f"{checkpoint} has another state of {name!r}: they differ in {min(here ^ there)}")
    return live


def check_alike(first: Mapping[str, Any], other: Mapping[str, Any], checkpoint: str) -> None:
    """Raise ValueError unless two parameters that share a param group here had the same settings there."""
    for key in (first.keys() | other.keys()) - {"params"}:
        one, two = first.get(key), other.get(key)
        tensors = isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor)
        if not (torch.equal(cast(torch.Tensor, one), cast(torch.Tensor, two)) if tensors else one == two):
            raise ValueError(
                f"{checkpoint} was saved with other param groups: {first['params'][0]} has {key} {one} there and "
                f"{other['params'][0]} {two}; in this run they are in one group"
            )
