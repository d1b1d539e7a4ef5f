"""Lightning's Trainer and Fabric with the real package: the scale of a plain loop, and a resume bit for bit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from manic import Mechanic
from manic.testing import run

pytest.importorskip("lightning", reason="Lightning is not installed")
import lightning as L
from lightning.fabric.strategies import ModelParallelStrategy as FabricModelParallel
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

STEPS, ROWS = 24, 8


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def batch(step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    x = x[rank::world]
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x.sum(1), x[:, 3]], 1)


def base(parameters: Any) -> Mechanic:
    return Mechanic(torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.1))


def schedule(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2 * STEPS)


def plain(clip: float | None = None, accumulate: int = 1, steps: int = STEPS) -> tuple[float, Tensor]:
    """S and the parameters after a loop without Lightning, on one process."""
    model = net()
    optimizer = base(model.parameters())
    scheduler = schedule(optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(accumulate):
            x, y = batch(step * accumulate + part)
            (nn.functional.mse_loss(model(x), y) / accumulate).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
    return float(optimizer.scale), flat(model)


def flat(model: nn.Module) -> Tensor:
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in whole])


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.scales: list[float] = []

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(
            next(self.parameters()), DTensor
        ):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        optimizer = base(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step"}}

    def training_step(self, rows: tuple[Tensor, Tensor], index: int) -> Tensor:
        return nn.functional.mse_loss(self.net(rows[0]), rows[1])

    def on_train_batch_end(self, *_: Any) -> None:
        self.scales.append(float(self.optimizers().scale))


class Batches(torch.utils.data.IterableDataset[Any]):
    def __init__(self, count: int, rank: int = 0, world: int = 1) -> None:
        self.count, self.rank, self.world = count, rank, world

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (batch(step, self.rank, self.world) for step in range(self.count))
