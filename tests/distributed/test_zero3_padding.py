"""Padding of partitions as DeepSpeed's ZeRO-3 makes them is in no sum; tests/integrations has DeepSpeed itself."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from manic import Mechanic
from manic.testing import ranks

SIZES = (5, 8, 3)


class FakeZeRO3:
    """What is read of DeepSpeed's optimizer."""

    def __init__(self, parts: list[list[Any]]) -> None:
        self.fp16_groups = parts
        self.fp32_partitioned_groups_flat = [partition(parameters) for parameters in parts]


def partition(parameters: list[Any]) -> nn.Parameter:
    """Partition parameters over the ranks, with 1e30 for padding, into one flat parameter."""
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


@contextlib.contextmanager
def deepspeed_is_imported() -> Iterator[None]:
    module = ModuleType("deepspeed.runtime.zero.stage3")
    vars(module)["DeepSpeedZeroOptimizer_Stage3"] = FakeZeRO3
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        yield


def gradient_of(parameters: Sequence[Tensor], step: int) -> list[Tensor]:
    return [(p.detach() - 0.1 * index - 0.01 * step) for index, p in enumerate(parameters)]


def make() -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(-1, 1, size, dtype=torch.float64)) for size in SIZES]


@ranks(3)
def test_the_scale_is_that_of_one_process() -> None:
    rank = dist.get_rank()
    alone = [dist.new_group([each]) for each in range(3)][rank]
    for variant in ("optax", "multiplicative"):
        with deepspeed_is_imported():
            equals_one_process(variant, rank, alone)


def equals_one_process(variant: str, rank: int, alone: Any) -> None:
    whole = make()
    reference = Mechanic(torch.optim.SGD(whole, lr=1.0), variant=variant, process_group=alone)
    parameters = make()
    optimizer = Mechanic(torch.optim.SGD(parameters, lr=1.0), variant=variant, plain="sharded")
    order = [2, 0, 1]  # not that of the model
    zero, other = FakeZeRO3([[parameters[index] for index in order]]), FakeZeRO3([make()])  # as an actor and a critic
    (flat,) = zero.fp32_partitioned_groups_flat
    for step in range(8):
        gradients = gradient_of(whole, step)
        parts = []
        for index in order:
            p, gradient = parameters[index], gradients[index]
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
    if rank == 2:
        assert other.fp32_partitioned_groups_flat[0].max() == 1e30  # nobody else's
