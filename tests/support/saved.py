"""Optimizers whose state is saved, with Mechanic and without, and the comparison of what is loaded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.optim import Optimizer

from manic import Mechanic
from manic.distributed.layout import local
from support.horizons import Horizons


def adamw(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def optax(parameters: Any) -> Optimizer:
    return Mechanic(torch.optim.AdamW(parameters, lr=1.0), variant="optax", s_init=1e-3)


def multiplicative(parameters: Any) -> Optimizer:
    return Mechanic(torch.optim.AdamW(parameters, lr=1.0))


def horizons(parameters: Any) -> Optimizer:
    return Mechanic(torch.optim.AdamW(parameters, lr=1.0), variant=Horizons())


MAKES = [adamw, optax, multiplicative, horizons]
Make = Callable[[Any], Optimizer]


def net(seed: int, layout: str = "plain") -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    if layout == "fsdp2":
        for layer in (model[0], model[2]):
            fully_shard(layer)
        fully_shard(model)
    elif layout != "plain":
        options: dict[str, Any] = {"use_orig_params": layout == "fsdp1-orig", "device_id": torch.device("cpu")}
        for index in (0, 2):
            model[index] = FullyShardedDataParallel(model[index], **options)
        model = FullyShardedDataParallel(model, **options)  # type: ignore[assignment]
    return model


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
        y = torch.stack((x[:, 0] * x[:, 1], x[:, 2].sin(), x.sum(1)), 1)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def shared_folder() -> str:
    box = [tempfile.mkdtemp()]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


@torch.no_grad()
def shards(model: nn.Module) -> list[Tensor]:
    return [local(p).clone() for p in model.parameters()]


def assert_equal(model: nn.Module, expected: list[Tensor]) -> None:
    for found, value in zip(shards(model), expected, strict=True):
        assert torch.equal(found, value)
