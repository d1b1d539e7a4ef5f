"""AdamW over given parameters, training for a number of steps, and comparison of the results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Loss = Callable[[int], Tensor]


def adamw(parameters: Any, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, **{"lr": 1.0, "weight_decay": 0.1, **options})


def train(optimizer: torch.optim.Optimizer, loss: Loss, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()


def tensors(parameters: list[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def assert_identical(first: list[Tensor], second: list[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
