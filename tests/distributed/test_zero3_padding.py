"""Padding of partitions as DeepSpeed's ZeRO-3 makes them is in no sum; tests/integrations has DeepSpeed itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from manic import Mechanic
from manic.testing import ranks

SIZES = (5, 8, 3)


def partition(parameters: list[Any]) -> nn.Parameter:
    """Partition parameters over the ranks, with infinities for padding, into one flat parameter."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parts = []
    for p in parameters:
        size = math.ceil(p.numel() / world)
        padded = torch.full((size * world,), 1e30, dtype=p.dtype)
        padded[: p.numel()] = p.detach()
        p.ds_tensor, p.ds_numel = padded[size * rank : size * (rank + 1)].clone(), p.numel()
        p.ds_tensor.ds_numel, p.ds_process_group = size, dist.group.WORLD
        parts.append(p.ds_tensor)
    return nn.Parameter(torch.cat(parts))


def gradient_of(parameters: list[Tensor], step: int) -> list[Tensor]:
    return [(p.detach() - 0.1 * index - 0.01 * step) for index, p in enumerate(parameters)]


def make() -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(-1, 1, size, dtype=torch.float64)) for size in SIZES]


@ranks(3)
def test_the_scale_is_that_of_one_process() -> None:
    rank = dist.get_rank()
    alone = [dist.new_group([each]) for each in range(3)][rank]
    for variant in ("optax", "multiplicative"):
        whole = make()
        reference = Mechanic(torch.optim.SGD(whole, lr=1.0), variant=variant, process_group=alone)
        parameters = make()
        optimizer = Mechanic(torch.optim.SGD(parameters, lr=1.0), variant=variant, plain="sharded")
        flat = partition(parameters)
        for step in range(8):
            gradients = gradient_of(whole, step)
            parts = []
            for p, gradient in zip(parameters, gradients):
                size = p.ds_tensor.ds_numel  # type: ignore[attr-defined]
                padded = torch.zeros(size * 3, dtype=p.dtype)
                padded[: p.numel()] = gradient
                parts.append(padded[size * rank : size * (rank + 1)])
            flat.grad = torch.cat(parts)
            optimizer.param_groups[0]["params"] = [flat]
            optimizer.step()
            optimizer.param_groups[0]["params"] = []
            for p, gradient in zip(whole, gradients):
                p.grad = gradient
            reference.step()
            assert optimizer.scale.item() == pytest.approx(reference.scale.item(), rel=1e-12)


@ranks(2)
def test_another_order_is_refused() -> None:
    parameters = make()
    optimizer = Mechanic(torch.optim.SGD(parameters, lr=1.0), plain="sharded")
    flat = partition(parameters)
    optimizer.param_groups[0]["params"] = [nn.Parameter(flat.detach().flip(0))]
    optimizer.param_groups[0]["params"][0].grad = torch.ones_like(flat)
    with pytest.raises(ValueError, match="rank 0: DeepSpeed's ZeRO-3 has its partitions in another order"):
        optimizer.step()
