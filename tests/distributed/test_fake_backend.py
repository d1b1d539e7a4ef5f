"""One process simulates many ranks with torch's fake backend: Mechanic steps without comparing ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.optim import AdamW
from torch.testing._internal.distributed.fake_pg import FakeStore

from manic import Mechanic
from manic.step.guard import Nonfinite
from manic.tuners.registry import TUNERS

WORLD_SIZE = 8


@pytest.fixture(autouse=True)
def fake_ranks() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=WORLD_SIZE, store=FakeStore())
    yield
    dist.destroy_process_group()


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def take_steps(model: nn.Module, optimizer: Mechanic) -> None:
    """Take three steps; the tuner must be finite after each."""
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        metrics = {name: value.item() for name, value in optimizer.metrics().items()}
        assert torch.tensor(list(metrics.values())).isfinite().all(), metrics
        assert metrics["scale"] > 0.0


@pytest.mark.parametrize("nonfinite", ["raise", "ignore"])
@pytest.mark.parametrize("variant", TUNERS)
def test_fsdp2(variant: str, nonfinite: Nonfinite) -> None:
    model = make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD_SIZE,)))
    base = AdamW(model.parameters(), lr=1.0, fused=True)
    take_steps(model, Mechanic(base, variant=variant, nonfinite=nonfinite))


def test_fsdp1_shards_count_once() -> None:
    """The fake backend returns this rank's values for all ranks, as if each held the same shard."""
    model = FullyShardedDataParallel(make_model(), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = Mechanic(AdamW(model.parameters(), lr=1.0), variant="optax")
    take_steps(model, optimizer)
    assert optimizer._layout.fsdp1_replicas == 1


def test_pipeline_stages() -> None:
    """The fake backend returns this stage's parameters for all stages."""
    model = make_model()
    take_steps(model, Mechanic(AdamW(model.parameters(), lr=1.0), pipeline_stages=2, variant="optax"))


def test_local_checks_still_run() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = Mechanic(AdamW(embedding.parameters(), lr=1.0), variant="optax")
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match="has a sparse gradient"):
        optimizer.step()
    optimizer = Mechanic(AdamW(nn.Linear(3, 3).parameters(), lr=1.0), pipeline_stages=3, variant="optax")
    with pytest.raises(ValueError, match="does not divide"):
        optimizer.step()
