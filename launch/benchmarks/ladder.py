"""A ladder of horizons: the same two models and optimizers for 300 to 30,000 steps, at three schedules."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from benchmarks.data import images, text
from benchmarks.tasks import adamw, sgd
from benchmarks.training import Task
from gpt.model import GPT

HORIZONS = (300, 1_000, 3_000, 10_000, 30_000)
_SCHEDULES = ("constant", "cosine", "wsd")


@dataclass(frozen=True)
class Ladder:
    """The tasks that differ in the horizon only."""

    model: str
    schedule: str
    tasks: tuple[str, ...]
    """From the shortest to the longest."""


def _gpt() -> nn.Module:
    return GPT(256, 16, layers=1, width=24, heads=2)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def _task(model: str, schedule: str, steps: int) -> Task:
    name = f"ladder-{model}-{schedule}-{steps}"
    if model == "gpt":
        what, problem = "GPT of 0.02M, AdamW", text(_gpt, 16, 4)
        return Task(
            name, f"{what}, {schedule}, {steps:,} steps", problem, adamw(fused=True), "adamw", steps, 2.0**-8, schedule
        )
    what, problem = "MLP on digits, SGD with momentum", images(_mlp, 32)
    return Task(name, f"{what}, {schedule}, {steps:,} steps", problem, sgd, "momentum", steps, 2.0**-4, schedule)


_ALL = {
    (model, schedule): [_task(model, schedule, steps) for steps in HORIZONS]
    for model in ("gpt", "mlp")
    for schedule in _SCHEDULES
}
TASKS = {task.name: task for tasks in _ALL.values() for task in tasks}
LADDERS = [Ladder(model, schedule, tuple(task.name for task in tasks)) for (model, schedule), tasks in _ALL.items()]
