"""Steps of a model in any layout, and comparison of their state over time and between ranks."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from manic.distributed.layout import local
from support.layouts import BATCH, Setup, batch
from support.tuners import state_of


def backward(prepared: Setup, step: int, dtype: torch.dtype = torch.float64) -> None:
    x, y = batch(step, dtype)
    share = BATCH // prepared.data_size
    part = slice(prepared.data_rank * share, (prepared.data_rank + 1) * share)
    prepared.optimizer.zero_grad()
    (prepared.model(x[part]) - y[part]).square().mean().backward()


def take_steps(prepared: Setup, first: int, number: int, dtype: torch.dtype = torch.float64) -> None:
    for step in range(first, first + number):
        backward(prepared, step, dtype)
        prepared.optimizer.step()


@torch.no_grad()
def everything(prepared: Setup) -> dict[str, Any]:
    """This rank's state that a step changes, and the settings that it changes temporarily."""
    mechanic = prepared.mechanic
    found: dict[str, Any] = {"tuner": state_of(mechanic).clone(), "grad mode": torch.is_grad_enabled()}
    for number, parameter in enumerate(prepared.model.parameters()):
        found[f"parameter {number}"] = local(parameter).clone()
    for index, group in enumerate(mechanic.param_groups):
        found[f"group {index}"] = copy.deepcopy({k: v for k, v in group.items() if k not in ("params", "mechanic")})
        for place, parameter in enumerate(group["params"]):
            for key, value in mechanic.state.get(parameter, {}).items():
                tensor = local(value).clone() if isinstance(value, Tensor) else value
                found[f"{key} of parameter {place} in group {index}"] = tensor
    return found


def differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) else a == b

    keys = first.keys() | second.keys()
    return sorted(key for key in keys if key not in first or key not in second or not same(first[key], second[key]))


def everyone(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
