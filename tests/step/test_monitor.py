"""Warnings about a scale that does not grow, is at its bound, or runs away: each once."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from manic import Mechanic
from manic.step.monitor import IDLE, INTERVAL, PATIENCE
from support.problems import problem


class Listener(logging.Handler):
    """Records manic's log messages."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        logging.getLogger("manic").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def run(steps: int, zero_after: int | None = None, **options: Any) -> tuple[Mechanic, list[str]]:
    """Train on the small problem, with zero gradients after some steps, and collect the log messages."""
    parameters, loss = problem()
    lr = options.pop("lr", 1.0)
    optimizer = Mechanic(torch.optim.AdamW(parameters, lr=lr), **{"variant": "optax", **options})
    listener = Listener()
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        if zero_after is not None and step >= zero_after:
            for parameter in parameters:
                parameter.grad.zero_()
        optimizer.step()
    return optimizer, listener.messages


@pytest.mark.parametrize(
    "options", [{}, {"nonfinite": "ignore"}, {"variant": "pytorch"}, {"nonfinite": "skip"}], ids=str
)
def test_warns_about_a_scale_that_does_not_grow(options: dict[str, Any]) -> None:
    assert run(PATIENCE - 1, zero_after=1, **options)[1] == []
    _, messages = run(2 * PATIENCE, zero_after=1, **options)
    assert len(messages) == 1
    assert f"after {PATIENCE} steps: it has not left its start" in messages[0]


@pytest.mark.parametrize("options", [{}, {"nonfinite": "ignore"}, {"variant": "multiplicative"}], ids=str)
def test_warns_about_gradients_that_have_always_been_zero(options: dict[str, Any]) -> None:
    assert run(IDLE - 1, zero_after=0, **options)[1] == []
    _, messages = run(2 * IDLE, zero_after=0, **options)
    assert len(messages) == 1
    assert f"no step in {IDLE} calls" in messages[0]


@pytest.mark.parametrize("options", [{}, {"nonfinite": "ignore"}, {"variant": "pytorch"}], ids=str)
@pytest.mark.parametrize("lr", [1e-4, 1.0, 1e3])
def test_does_not_warn_about_a_growing_scale(lr: float, options: dict[str, Any]) -> None:
    optimizer, messages = run(PATIENCE + 10, lr=lr, **options)
    assert messages == []
    assert optimizer.scale > 0


def test_does_not_warn_about_a_correct_initial_scale() -> None:
    learned = run(PATIENCE)[0].scale.item()
    assert run(PATIENCE + 10, s_init=learned)[1] == []


def test_warns_once_about_a_runaway_scale() -> None:
    parameter = torch.ones(10, requires_grad=True)
    optimizer = Mechanic(torch.optim.SGD([parameter], lr=1.0), s_decay=0.0, variant="optax")
    listener = Listener()
    for _ in range(200):  # a linear loss has no minimum
        parameter.grad = torch.ones(10)
        optimizer.step()
    assert ["probably run away" in message for message in listener.messages] == [True]


@pytest.mark.parametrize("options", [{}, {"variant": "pytorch"}, {"store_delta": False}], ids=str)
def test_s_max_bounds_the_scale_and_warns_once(options: dict[str, Any]) -> None:
    free, messages = run(100, **options)
    assert messages == []
    bound = free.scale.item() / 3
    optimizer, messages = run(100, s_max=bound, **options)
    assert optimizer.scale.item() <= bound * (1 + 1e-12)
    assert len(messages) == 1
    assert "held there" in messages[0]
    assert run(100, s_max=100.0, **options)[0].scale == free.scale


def test_checks_the_scale_at_intervals_without_a_host_sync_per_step() -> None:
    parameter = torch.ones(10, requires_grad=True)
    optimizer = Mechanic(torch.optim.SGD([parameter], lr=1.0), s_decay=0.0, nonfinite="ignore", variant="optax")
    listener, warned_after = Listener(), []
    for step in range(2 * INTERVAL):
        parameter.grad = torch.ones(10)
        optimizer.step()
        if listener.messages:
            warned_after.append(step + 1)
            listener.messages.clear()
    assert len(warned_after) == 1
    assert warned_after[0] in (PATIENCE, INTERVAL)
