"""torch's default device decides where a model is built, and nothing about Mechanic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LinearLR

from manic import Mechanic
from manic.checkpoint import Checkpointer
from manic.inspect import inspect
from manic.testing import run


def trained(folder: str, device: str | None, variant: str) -> list[float]:
    """Train, check, save, load into a new model, train on; with ``device`` the default of all that Mechanic does."""
    scales: list[float] = []
    is_sharded = dist.is_initialized() and dist.get_world_size() > 1
    for part in range(2):
        torch.manual_seed(part)  # the second part loads what the first has saved
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        if is_sharded:
            fully_shard(model)
        inputs = [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)).double() for i in range(6)]
        torch.set_default_device(device)
        try:
            optimizer = Mechanic(torch.optim.AdamW(model.parameters(), lr=1.0), variant=variant, betas=(0.9,))
            schedule = LinearLR(optimizer)
            checkpointer = Checkpointer(folder, model, optimizer, objects={"schedule": schedule})
            if part == 1:
                checkpointer.load()
            for x in inputs[3 * part : 3 * part + 3]:
                optimizer.zero_grad()
                (model(x) - x[:, :2]).square().mean().backward()
                optimizer.step()
                schedule.step()
                optimizer.check_consistency()
                scales += [float(optimizer.scale), float(optimizer.metrics()["h"])]
            if part == 0:
                checkpointer.save(3)
                checkpointer.wait()
                assert inspect(checkpointer.path(3))["integrity"]["problems"] == []
        finally:
            torch.set_default_device(None)
    return scales


@pytest.mark.parametrize("variant", ["multiplicative", "optax"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_has_no_influence(world_size: int, variant: str, tmp_path: Path) -> None:
    outcomes = [run(trained, world_size, str(tmp_path / str(device)), device, variant) for device in (None, "meta")]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0][-2] > 0.0
