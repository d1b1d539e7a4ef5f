"""The flat keys under which a run's state stands in a checkpoint, and the nested states that they stand for.

It knows how DCP and torch's state dicts name things, and no layout and no files.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    _get_fqns,  # the name that torch gives a parameter, without wrappers' prefixes; tests/checkpoint/test_run_state.py
)

__all__ = [
    "all_parameter_names",
    "as_number",
    "flat_entries",
    "flat_keys",
    "nest",
    "parameter_names",
    "split",
    "whole_or_flat",
]


def parameter_names(model: nn.Module) -> dict[int, str]:
    """The name in a checkpoint of each parameter, by identity."""
    return {key: min(names) for key, names in all_parameter_names(model).items()}


def all_parameter_names(model: nn.Module) -> dict[int, set[str]]:
    """The names in a checkpoint of each parameter, by identity: several, where it is one of FSDP1's flat ones."""
    return {id(p): set(_get_fqns(model, name)) for name, p in model.named_parameters()}


def flat_keys(value: Any, prefix: str) -> Iterator[str]:
    """The keys under which DCP stores a nested state."""
    return (key for key, _ in flat_entries(value, prefix))


def flat_entries(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """A nested state as DCP stores it: keys, and what is stored under them."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from flat_entries(each, f"{prefix}.{key}")
    elif isinstance(value, list) and any(isinstance(each, Mapping) or _has_tensor(each) for each in value):
        for index, each in enumerate(value):
            yield from flat_entries(each, f"{prefix}.{index}")
    else:
        yield prefix, value


def as_number(value: Any) -> Any:
    """A NumPy scalar, which a schedule may have made a learning rate, as the number that it is."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 else value


def whole_or_flat(state: Any) -> Any:
    """An object's state as it is where it holds tensors, which DCP then stores one by one; else as one value.

    One value comes back as it was, with its empty dicts, and with keys that a fresh object's state does not have.
    """
    return state if _has_tensor(state) else (state,)


def _has_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_tensor(each) for each in value.values())
    if isinstance(value, list):
        return any(_has_tensor(each) for each in value)
    return isinstance(value, torch.Tensor)


def split(path: str, parameters: Container[str]) -> tuple[str, str]:
    """A key of the flat state as a parameter's name and the rest, which is empty if no parameter is known."""
    name = path
    while name not in parameters:
        if "." not in name:
            return path, ""
        name = name.rsplit(".", 1)[0]
    return name, path[len(name) + 1 :]


def nest(flat: Mapping[str, Any], group_of: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The optimizer state as torch nests it, with the param groups of ``group_of``, or one for each parameter.

    Torch's own inverse asks the live state for names, and with FSDP1 ranks then gather different ones.
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
    # Torch takes an empty state for one with numbers as names, and does not look at the groups' names then.
    return {"state": state or {"": {}}, "param_groups": list(groups.values())}
