"""A run that can be saved and resumed at any step: a layout's model and optimizer, a scheduler and a counter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.stateful import Stateful

from manic.checkpoint import Checkpointer
from support.layouts import BATCH, Setup, batch, setup


class Counter:
    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


class Run:
    """A run with noise from each rank's random state: it resumes bit for bit only if that state is restored too."""

    def __init__(
        self, layout: str, base: str, directory: str | Path, *, noise: bool = True, setting: Any = None, **options: Any
    ) -> None:
        self.setup: Setup = setup(layout, base, torch.float64, **{"s_init": 1e-3, **(setting or {})})
        self.counter = Counter()
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.setup.optimizer, T_max=40)
        self.noise = noise and self.setup.data_size == (dist.get_world_size() if dist.is_initialized() else 1)
        objects: dict[str, Stateful] = {"counter": self.counter, "scheduler": self.scheduler}
        self.checkpointer = Checkpointer(directory, self.setup.model, self.setup.optimizer, objects=objects, **options)

    def train(self, steps: int) -> list[Any]:
        """Take steps, and return the scale after each."""
        scales = []
        for _ in range(steps):
            self.backward()
            self.setup.optimizer.step()
            self.scheduler.step()
            self.counter.step += 1
            scales.append(self.setup.mechanic.scale.tolist())
        return scales

    def backward(self) -> None:
        """Compute the gradients of the next step."""
        x, y = batch(self.counter.step, torch.float64)
        share = BATCH // self.setup.data_size
        part = slice(self.setup.data_rank * share, (self.setup.data_rank + 1) * share)
        self.setup.optimizer.zero_grad()
        noise = 0.01 * torch.rand(()) if self.noise else 0.0
        (self.setup.model(x[part]) - y[part] - noise).square().mean().backward()

    def result(self) -> tuple[Any, dict[str, torch.Tensor]]:
        return self.setup.mechanic.scale.tolist(), self.setup.gather()


def assert_identical(first: Any, second: Any) -> None:
    assert first[0] == second[0]
    for name, value in first[1].items():
        assert torch.equal(value, second[1][name]), name
