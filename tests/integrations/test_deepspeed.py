"""DeepSpeed's ZeRO with the real package: the scale of one process, or an error on all ranks."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from manic import Mechanic
from manic.testing import run, shutdown

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.fixture(autouse=True)
def _new_processes() -> Iterator[None]:
    """DeepSpeed keeps process groups in its modules, so that each test needs processes of its own."""
    shutdown()
    yield
    shutdown()


STEPS = 16
PER_RANK = 30


def make(groups: int) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    parameters = list(model.parameters())
    if groups == 1:
        return model, parameters
    decayed = [p for p in parameters if p.ndim > 1]
    return model, [{"params": decayed, "weight_decay": 0.1}, {"params": [p for p in parameters if p.ndim < 2]}]


def data(world: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * PER_RANK * world, 16, generator=generator)
    return x, torch.tanh(x @ torch.randn(16, 4, generator=generator))


def train(stage: int, groups: int, variant: str) -> tuple[float, float]:
    """The scales of ``STEPS`` steps with DeepSpeed, and of one process."""
    os.environ.update(
        DS_ACCELERATOR="cpu", DS_BUILD_OPS="0", RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()),
        WORLD_SIZE=str(dist.get_world_size()), MASTER_ADDR="127.0.0.1", MASTER_PORT="29500",
    )  # fmt: skip
    import deepspeed

    rank, world = dist.get_rank(), dist.get_world_size()
    deepspeed.init_distributed(dist_backend="gloo")
    model, parameters = make(groups)
    plain = "sharded" if stage else "replicated"
    optimizer = Mechanic(torch.optim.AdamW(parameters, lr=1.0), variant=variant, plain=plain)  # type: ignore[arg-type]
    config = {
        "train_micro_batch_size_per_gpu": PER_RANK, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    alone = [dist.new_group([each]) for each in range(world)][rank]
    whole, parameters = make(groups)
    reference = Mechanic(torch.optim.AdamW(parameters, lr=1.0), variant=variant, process_group=alone)
    x, y = data(world)
    for step in range(STEPS):
        start = (step * world + rank) * PER_RANK
        part = slice(start, start + PER_RANK)
        engine.backward(nn.functional.mse_loss(engine(x[part]), y[part]))
        engine.step()
        part = slice(step * world * PER_RANK, (step + 1) * world * PER_RANK)
        reference.zero_grad()
        nn.functional.mse_loss(whole(x[part]), y[part]).backward()
        reference.step()
    return optimizer.scale.item(), reference.scale.item()


def refuse(stage: int, variant: str) -> None:
    with pytest.raises(ValueError, match="cannot be stepped part by part"):
        train(stage, 2, variant)


@pytest.mark.parametrize("variant", ["multiplicative", "optax"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_one_group_is_right(world_size: int, stage: int, variant: str) -> None:
    for scale, expected in run(train, world_size, stage, 1, variant):
        assert scale == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("variant", ["multiplicative", "optax"])
def test_several_groups_are_right_without_zero(variant: str) -> None:
    for scale, expected in run(train, 2, 0, 2, variant):
        assert scale == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("variant", ["multiplicative", "optax"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_several_groups_are_refused_under_zero(stage: int, variant: str) -> None:
    run(refuse, 2, stage, variant)
