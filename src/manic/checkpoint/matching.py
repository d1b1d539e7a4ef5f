"""Whether a checkpoint fits this run, and which of its entries to read.

Compares names, shapes and settings of the live state with the saved ones; reads no data and changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from manic.checkpoint.flat_state import flat_keys, split
from manic.checkpoint.settings import same, wanted_settings
from manic.checkpoint.targets import check_covered, check_kind, target_of
from manic.distributed.collectives import rank
from manic.mechanic import Mechanic

__all__ = ["Member", "check_model", "check_same_settings", "wanted_of_object", "wanted_of_optimizer"]

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
    check_covered([f"model.{name}" for name in model], saved, checkpoint)
    unknown = {key for key in saved if key.startswith("model.")} - names
    if unknown:
        first = min(unknown).removeprefix("model.")
        raise ValueError(f"{checkpoint} is of another model: this model has no {first}")


@dataclass(frozen=True)
class Member:
    """A parameter of one of this rank's optimizers."""

    tensor: torch.Tensor
    own_keys: frozenset[str]
    """Keys of the optimizer's state that a checkpoint may lack."""
    keeps_state: bool
    """Whether the optimizer has any other state, on any rank."""


def wanted_of_optimizer(
    flat: Mapping[str, Any],
    saved: Mapping[str, Any],
    members: Mapping[str, Member],
    everyones: Container[str],
    checkpoint: str,
) -> dict[str, Any]:
    """Select what to read from the checkpoint for the optimizers: each saved entry of a state, and settings by name.

    A parameter without a gradient before the save has no saved state. Another optimizer skips Mechanic's saved state.
    A parameter may have saved state and none yet in this run, for example because it is frozen. Settings are read into
    copies, so that an optimizer can refuse them.

    Args:
        flat: The live optimizers' state.
        saved: DCP's metadata of every key in the checkpoint.
        members: This rank's parameters by name.
        everyones: Names of the parameters of all ranks' optimizers.
        checkpoint: The checkpoint's name in messages.

    Returns:
        Where to read each entry, by its key in ``flat``.

    Raises:
        ValueError: if an entry cannot be loaded, or one that this run needs is missing.
    """
    wanted = wanted_settings(flat, saved, {Mechanic.GROUP_KEY}, Mechanic.LIVE_KEYS)
    names = {*members, *(_parameter_of_setting(key.removeprefix("optimizer.")) for key in saved)}
    live: dict[str, set[str]] = {}
    for key in flat:
        if key.startswith("state."):
            parameter, state = split(key.removeprefix("state."), names)
            live.setdefault(parameter, set()).add(state)
    have_state = set()
    for entry, there in saved.items():
        if not entry.startswith("optimizer.state."):
            continue
        key = entry.removeprefix("optimizer.")
        parameter, state = split(key.removeprefix("state."), names)
        have_state.add(parameter)
        what = f"{state} of {parameter}"
        if parameter not in members:
            if parameter not in everyones and state not in _MECHANIC_KEYS:
                raise ValueError(
                    f"{checkpoint} has {state or 'state'} for {parameter}, which is in no param group of this run: "
                    "add its group before loading (add_param_group), or build the optimizer over the same parameters"
                )
        elif key in flat:
            _check_size(flat[key], there, what, checkpoint)
            wanted[key] = flat[key]
        elif _needs_a_target(state, parameter, members[parameter], live.get(parameter, set()), checkpoint):
            wanted[key] = target_of(there, members[parameter].tensor, what, checkpoint)
            if state not in _MECHANIC_KEYS | members[parameter].own_keys:
                check_kind(state, flat, parameter, checkpoint)
    _check_complete(live, have_state, saved, members, checkpoint)
    check_covered([f"optimizer.{key}" for key in wanted], saved, checkpoint)
    return wanted


def _needs_a_target(state: str, parameter: str, member: Member, live: set[str], checkpoint: str) -> bool:
    """Whether to read a saved state that the live parameter does not have: ``live`` is what it has.

    Raises:
        ValueError: if this run's optimizer has no use for it.
    """
    if state in _MECHANIC_KEYS | member.own_keys:
        return state in member.own_keys and not live & member.own_keys  # with x_ref but no Delta, it recomputes Delta
    if live - member.own_keys or (member.tensor.requires_grad and not member.keeps_state):
        raise ValueError(
            f"{checkpoint} is of another optimizer or other options: it has {state} for {parameter}, this run's "
            "optimizer has none (if it has taken steps, load before the first)"
        )
    return True


def _check_complete(
    live: Mapping[str, set[str]],
    have_state: Container[str],
    saved: Mapping[str, Any],
    members: Mapping[str, Member],
    checkpoint: str,
) -> None:
    """Raise ValueError if a parameter has saved state, but not all that this run's optimizer has for it."""
    for parameter, states in live.items():
        member = members.get(parameter)
        for state in states - (member.own_keys if member else frozenset()):
            if parameter in have_state and f"optimizer.state.{parameter}.{state}" not in saved:
                raise ValueError(
                    f"{checkpoint} is of another optimizer or other options: it has no {state} for {parameter}"
                )


def _parameter_of_setting(key: str) -> str:
    return key.removeprefix("param_groups.").rsplit(".", 1)[0] if key.startswith("param_groups.") else ""


def _check_size(value: Any, there: Any, what: str, checkpoint: str) -> None:
    size = tuple(there.size) if isinstance(there, TensorStorageMetadata) else None
    expected = tuple(value.shape) if isinstance(value, torch.Tensor) else None
    if size != expected:
        raise ValueError(
            f"{checkpoint} is of another optimizer: {what} is "
            f"{'a number' if size is None else f'of shape {size}'} in the checkpoint and "
            f"{'a number' if expected is None else f'of shape {expected}'} in this run"
        )


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
        if not same(one, two):
            raise ValueError(
                f"{checkpoint} has other param groups: there {first['params'][0]} has {key} {one} and "
                f"{other['params'][0]} has {two}; in this run they share a group"
            )
