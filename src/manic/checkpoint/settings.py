"""Settings of param groups: read from a checkpoint by name, and converted to the type that they have in this run.

A learning rate may be a number in one run and a tensor in another, for a compiled or captured step.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from manic.checkpoint.flat_state import as_number, split

__all__ = ["LiveTensors", "converted", "same", "wanted_settings"]


def wanted_settings(
    flat: Mapping[str, Any], saved: Mapping[str, Any], skipped: Container[str], never: Container[str]
) -> dict[str, Any]:
    """Select the settings to read from the checkpoint: all of this run's parameters, as the checkpoint holds them.

    Args:
        flat: The live optimizers' state.
        saved: DCP's metadata of every key in the checkpoint.
        skipped: Settings that are not read unless this run has them.
        never: Settings that are not read: they describe the program and not the run.

    Returns:
        Where to read each setting, by its key as in ``flat``: new tensors, and ``None`` for other values.
    """
    parameters = {key.rsplit(".", 1)[0] for key in flat if key.startswith("param_groups.")}
    wanted: dict[str, Any] = {}
    for entry, there in saved.items():
        parameter, rest = split(entry.removeprefix("optimizer."), parameters)
        if not rest:
            continue
        # DCP stores the parts of a dict, and of a list of tensors, one by one.
        setting, *parts = rest.split(".")
        key = f"{parameter}.{setting}"
        if setting in never or (key not in flat and setting in skipped):
            continue
        if not parts:
            wanted[key] = _target(there)
            continue
        place = wanted.setdefault(key, {})
        for part in parts[:-1]:
            place = place.setdefault(part, {})
        place[parts[-1]] = _target(there)
    return wanted


def _target(there: Any) -> Any:
    if not isinstance(there, TensorStorageMetadata):
        return None
    return torch.empty(there.size, dtype=there.properties.dtype, device="cpu")


def converted(saved: Any, live: Any, what: str) -> Any:
    """A saved setting as the type of the live one: a tensor as a number, a number as a tensor, also in sequences.

    Args:
        saved: The saved value.
        live: The value in this run.
        what: The checkpoint and the setting, in words.

    Returns:
        The value to load; a new tensor of the live dtype and device where the live setting is a tensor.

    Raises:
        ValueError: if there is no conversion.
    """
    if isinstance(live, (tuple, list)):
        if isinstance(saved, dict) and list(saved) == [str(index) for index in range(len(saved))]:
            saved = list(saved.values())  # read in parts
        if isinstance(saved, (tuple, list)) and len(saved) == len(live) and type(live) in (tuple, list):
            return type(live)(converted(each, other, what) for each, other in zip(saved, live))
        if _has_tensor(saved) or _has_tensor(live):
            raise ValueError(_misfit(saved, live, what))
        return saved
    if isinstance(live, Mapping) and isinstance(saved, Mapping):
        here = {str(key): key for key in live}
        if here.keys() != {str(key) for key in saved}:
            raise ValueError(_misfit(saved, live, what))
        return {here[str(key)]: converted(value, live[here[str(key)]], what) for key, value in saved.items()}
    if isinstance(live, Tensor):
        if isinstance(saved, (bool, int, float)):
            return torch.full_like(live, saved, requires_grad=False)
        if isinstance(saved, Tensor) and saved.numel() == live.numel():
            return saved.reshape(live.shape).to(device=live.device, dtype=live.dtype)
    elif not _has_tensor(saved) or live is None:
        return saved
    elif isinstance(live, (bool, int, float)) and isinstance(saved, Tensor) and saved.numel() == 1:
        return saved.item()
    raise ValueError(_misfit(saved, live, what))


def same(one: Any, two: Any) -> bool:
    """Whether two settings are equal; tensors by their values."""
    if isinstance(one, Tensor) or isinstance(two, Tensor):
        first, second = torch.as_tensor(one, device="cpu"), torch.as_tensor(two, device="cpu")
        return first.shape == second.shape and bool((first == second.to(first.device)).all())
    if isinstance(one, (tuple, list)) and isinstance(two, (tuple, list)):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two))
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    return bool(one == two)


class LiveTensors:
    """The tensors among an optimizer's settings, which a compiled or captured step reads: kept over a load.

    Args:
        optimizer: The optimizer, before the load.
        except_for: Settings that are left alone.
    """

    def __init__(self, optimizer: Optimizer, except_for: frozenset[str]) -> None:
        self._tensors = [
            {key: value for key, value in group.items() if isinstance(value, Tensor) and key not in except_for}
            for group in optimizer.param_groups
        ]

    def keep(self, groups: Sequence[dict[str, Any]]) -> None:
        """Copy loaded values into the tensors of before; not where groups that shared one got different values."""
        found: dict[int, list[tuple[dict[str, Any], str, Tensor]]] = {}
        for group, tensors in zip(groups, self._tensors):
            for key, tensor in tensors.items():
                found.setdefault(id(tensor), []).append((group, key, tensor))
        for places in found.values():
            (group, key, tensor), values = places[0], [group[key] for group, key, _ in places]
            first = values[0]
            if isinstance(first, Tensor) and first.shape == tensor.shape and all(same(first, each) for each in values):
                with torch.no_grad():
                    tensor.copy_(first)
                for group, key, _ in places:
                    group[key] = tensor


def _has_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_tensor, value.values()))
    return any(map(_has_tensor, value)) if isinstance(value, (tuple, list)) else isinstance(value, Tensor)


def _misfit(saved: Any, live: Any, what: str) -> str:
    return f"{what} is {as_number(saved)!r} in the checkpoint, which cannot become what it is in this run: {live!r}"
