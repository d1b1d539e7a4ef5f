"""The sweep that a method is compared with: its grid of learning rates, its best loss, and the excess over that."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.methods import SWEEP
from benchmarks.results import Results, Run, mean_loss
from benchmarks.tasks import TASKS
from benchmarks.training import Task

_FLOOR = 1e-10  # of the loss at the start; lower losses count as equal


def excess(task: Task, loss: float, best: float, start: float) -> float:
    """How far ``loss`` lies above ``best``.

    For a named task relative to ``best``, as its table always had it. For any other ``log(loss / best)``, and where the
    best run lowers the loss by more than a factor e, as a share of ``log(start / best)``: the way that it comes in the
    logarithm, so that a loss that falls by decades does not drown the rest. To first order both are the same where the
    loss falls by less than that factor; where it falls by more, the first is larger, twice as large for a factor
    e squared.
    """
    if task.name in TASKS:
        return loss / best - 1.0
    loss, best = (max(value, _FLOOR * start) for value in (loss, best))
    return math.log(loss / best) / max(1.0, math.log(start / best))


@dataclass(frozen=True)
class Sweep:
    """The losses of a task's grid, which are complete."""

    task: Task
    losses: dict[float, float]
    """Mean over the seeds, by learning rate in ascending order."""
    start: float
    """Loss before the first step, mean over the seeds."""

    @property
    def best_lr(self) -> float:
        return min(self.losses, key=self.losses.__getitem__)

    @property
    def best(self) -> float:
        """The lowest loss."""
        return self.losses[self.best_lr]

    def excess(self, loss: float) -> float:
        """How far a loss lies above the best of the grid."""
        return self.excess_over(loss, self.best)

    def excess_over(self, loss: float, other: float) -> float:
        """How far a loss lies above another one, on the same scale."""
        return excess(self.task, loss, other, self.start)


def grid(task: Task, seeds: Sequence[int], results: Results) -> list[float]:
    """Learning rates whose losses are wanted, in ascending order; more results may extend it.

    First by factors of 4 until the best is inside, then by 2 around it, until two lie on either side of it. The guess
    for a named task is near the best: its grid begins with factors of 2.
    """
    powers = [-2, -1, 0, 1, 2] if task.name in TASKS else [-4, -2, 0, 2, 4]
    while True:
        lrs = [task.guess * 2.0**power for power in powers]
        losses = [mean_loss(results, task.name, SWEEP, lr, seeds) for lr in lrs]
        if any(loss is None for loss in losses):
            return lrs
        best = min(zip(losses, powers))[1]
        if best in (powers[0], powers[-1]):
            near = {best - 2, best + 2}
        else:
            near = {best - 2, best - 1, best + 1, best + 2}
        if near <= set(powers):
            return lrs
        powers = sorted(near | set(powers))


def sweep_of(task: Task, seeds: Sequence[int], results: Results) -> Sweep | None:
    """The sweep of a task; ``None`` if its grid is not complete or all of it diverged."""
    losses = {}
    for lr in grid(task, seeds, results):
        loss = mean_loss(results, task.name, SWEEP, lr, seeds)
        if loss is None:
            return None
        losses[lr] = loss
    start = statistics.fmean(results[Run(task.name, SWEEP, task.guess, seed)].start for seed in seeds)
    return Sweep(task, losses, start) if math.isfinite(min(losses.values())) else None
