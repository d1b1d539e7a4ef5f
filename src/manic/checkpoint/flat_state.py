"""Conversion between the flat keys of a checkpoint and nested state dicts.

Follows the naming of DCP and of torch's state dicts; does not depend on layouts or files.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    _get_fqns,  # a parameter's name without wrappers' prefixes; tested in tests/checkpoint/test_run_state.py
)

__all__ = [
    "all_parameter_names",
    "as_number",
    "flat_entries",
    "flat_keys",
    "flatten",
    "nest",
    "parameter_names",
    "split",
    "unflatten_like",
    "whole_or_flat",
]


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Each parameter's name in a checkpoint, by ``id``."""
    return {key: min(names) for key, names in all_parameter_names(model).items()}


def all_parameter_names(model: nn.Module) -> dict[int, set[str]]:
    """Each parameter's names in a checkpoint, by ``id``: several for FSDP1's flat parameters."""
    return {id(p): set(_get_fqns(model, name)) for name, p in model.named_parameters()}


def flat_keys(value: Any, prefix: str) -> Iterator[str]:
    """The keys under which DCP stores a nested state."""
    return (key for key, _ in flat_entries(value, prefix))


def flat_entries(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Keys and values under which DCP stores a nested state."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from flat_entries(each, f"{prefix}.{key}")
    elif isinstance(value, list) and any(isinstance(each, Mapping) or _has_tensor(each) for each in value):
        for index, each in enumerate(value):
            yield from flat_entries(each, f"{prefix}.{index}")
    else:
        yield prefix, value


def as_number(value: Any) -> Any:
    """Convert a NumPy scalar, for example a learning rate set by a schedule, to a Python number."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 else value


def whole_or_flat(state: Any) -> Any:
    """An object's state unchanged if it holds tensors, which DCP stores one by one; else wrapped as one value.

    A state stored as one value keeps empty dicts, and keys that a new object's state does not have.
    """
    return state if _has_tensor(state) else (state,)


def _has_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_tensor(each) for each in value.values())
    if isinstance(value, list):
        return any(_has_tensor(each) for each in value)
    return isinstance(value, torch.Tensor)


def split(path: str, parameters: Container[str]) -> tuple[str, str]:
    """Split a flat key into a parameter's name and the rest; the rest is empty if no parameter matches."""
    name = path
    while name not in parameters:
        if "." not in name:
            return path, ""
        name = name.rsplit(".", 1)[0]
    return name, path[len(name) + 1 :]


def flatten(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Flat keys for an optimizer's state dict: each has its parameter's name in it, as ranks may own different ones.

    As torch's ``flatten_optimizer_state_dict``, which allows nothing but tensors and numbers in the state.
    """
    flat: dict[str, Any] = {}
    for name, state in state_dict["state"].items():
        flat.update(_flat_state(state, f"state.{name}"))
    for group in state_dict["param_groups"]:
        for name in group["params"]:
            flat.update({f"param_groups.{name}.{key}": value for key, value in group.items() if key != "params"})
    return flat


def _flat_state(state: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(state, dict):
        for key, value in state.items():
            yield from _flat_state(value, f"{prefix}.{key}")
    elif isinstance(state, list) and _has_tensor(state):  # DCP stores its parts
        for index, value in enumerate(state):
            yield from _flat_state(value, f"{prefix}.{index}")
    else:
        yield prefix, state


def unflatten_like(example: Any, state: Any) -> Any:
    """A parameter's state of :func:`nest` with keys that are numbers, and lists, where ``example`` has them."""
    if not isinstance(state, dict):
        return state
    if isinstance(example, list):
        return [unflatten_like(example[0] if example else None, state[key]) for key in sorted(state, key=int)]
    known = {str(key): (key, value) for key, value in example.items()} if isinstance(example, dict) else {}
    pairs = ((known.get(name, (name, None)), value) for name, value in state.items())
    return {key: unflatten_like(each, value) for (key, each), value in pairs}


def nest(flat: Mapping[str, Any], group_of: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The optimizer state as torch nests it, with the param groups of ``group_of``, or one group per parameter.

    Torch's own inverse takes names from the live state; with FSDP1, ranks would then gather different names.
    """
    parameters = set[str]()
    groups: dict[Any, dict[str, Any]] = {}
    for key, value in flat.items():
        kind, path = key.split(".", 1)
        if kind == "param_groups":
            name, setting = path.rsplit(".", 1)
            group = groups.setdefault(name if group_of is None else group_of.get(name, name), {"params": []})
            if name not in parameters:
                parameters.add(name)
                group["params"].append(name)
            group[setting] = value
    state: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        kind, path = key.split(".", 1)
        if kind == "state":
            name, rest = split(path, parameters)
            *outer, last = rest.split(".")
            place = state.setdefault(name, {})
            for part in outer:
                place = place.setdefault(part, {})
            place[last] = value
    # Torch treats an empty state as keyed by numbers, and then ignores the names in the groups.
    return {"state": state or {"": {}}, "param_groups": list(groups.values())}
