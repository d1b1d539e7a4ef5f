"""An optimizer's part of a checkpoint, by its parameters' names; ZeRO's is that of its inner optimizer.

Works on live optimizers; does not depend on the model, the checkpoint or its files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from manic.checkpoint.flat_state import nest, unflatten_like

__all__ = ["add_settings_of_all_groups", "copy_settings", "load_by_name", "own_keys_of"]


def add_settings_of_all_groups(
    zero: ZeroRedundancyOptimizer, names: Mapping[int, str], flat: dict[str, Any], saved: Iterable[str]
) -> None:
    """Add the settings of every param group to the entries to load: a rank may own no parameter of a group."""
    prefix = "optimizer.param_groups."
    known = {key.removeprefix(prefix).rsplit(".", 1)[0] for key in saved if key.startswith(prefix)}
    for group, mine in zip(zero.param_groups, zero.optim.param_groups):
        members = [names[id(parameter)] for parameter in group["params"]]
        first = next((name for name in members if name in known), members[0])
        for key, value in mine.items():
            if key != "params":
                value = value.clone() if isinstance(value, torch.Tensor) else value
                flat.setdefault(f"param_groups.{first}.{key}", value)


def load_by_name(
    optimizer: Optimizer, inner: Optimizer, names: Mapping[int, str], flat: Mapping[str, Any], extra: Mapping[str, Any]
) -> None:
    """Load this rank's part of an optimizer; ``inner`` differs for ZeRO, where the rank may own none of a group.

    Torch's ``set_optimizer_state_dict`` leaves out the state of frozen parameters. Settings that ``flat`` lacks for all
    parameters of a group keep their values.
    """
    nested = nest(flat)
    settings = {group["params"][0]: group for group in nested["param_groups"]}
    # Some optimizers have numbers as keys inside of a parameter's state, or lists.
    live = {id(parameter): state for parameter, state in inner.state.items() if isinstance(state, dict) and state}
    example = next(iter(live.values()), {})
    groups, states = [], {}
    for group, mine in zip(optimizer.param_groups, inner.param_groups):
        own = {names[id(parameter)]: parameter for parameter in mine["params"]}
        for name, parameter in own.items():
            if name in nested["state"]:
                states[name] = unflatten_like(live.get(id(parameter), example), nested["state"][name])
        kept = {key: value for key, value in mine.items() if key not in own_keys_of(inner)}
        loaded = (settings.get(names[id(parameter)]) for parameter in group["params"])
        first: dict[str, Any] = next((each for each in loaded if each), {})
        groups.append({**kept, **first, "params": list(own)})
    inner.load_state_dict({**extra, "state": states, "param_groups": groups})


def own_keys_of(optimizer: Optimizer) -> frozenset[str]:
    """State and settings that a checkpoint may lack."""
    return frozenset(getattr(optimizer, "own_keys", ()))


def copy_settings(source: Sequence[dict[str, Any]], target: Sequence[dict[str, Any]]) -> None:
    """Copy the settings of param groups into other ones."""
    for theirs, mine in zip(source, target):
        mine.update({key: value for key, value in theirs.items() if key != "params"})
