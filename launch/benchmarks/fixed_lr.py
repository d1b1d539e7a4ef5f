"""The opponent that a user really has: for each family of optimizers, the learning rate that is best on other tasks."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence

from benchmarks.sweep import Sweep

FAMILIES = {
    "adamw": "Adam", "adam": "Adam", "nadam": "Adam", "rmsprop": "Adam", "sgd": "SGD", "momentum": "SGD",
    "lion": "Lion", "muon": "Muon", "adagrad": "Adagrad", "adafactor": "Adafactor",
}  # fmt: skip
"""By base optimizer."""


def fixed_lrs(sweeps: Iterable[Sweep]) -> dict[str, float]:
    """By task, the learning rate that is best on the other tasks of its family.

    Best is the lowest mean over those tasks of the excess, capped at 1, among the learning rates of their grids. A task
    without another one of its family has none: nobody would take Adam's learning rate for Lion.
    """
    found = {}
    by_family: dict[str, list[Sweep]] = {}
    for sweep in sweeps:
        by_family.setdefault(FAMILIES[sweep.task.base], []).append(sweep)
    for family in by_family.values():
        for left_out in family:
            others = [sweep for sweep in family if sweep is not left_out]
            if others:
                found[left_out.task.name] = _best(others)
    return found


def _best(sweeps: Sequence[Sweep]) -> float:
    lrs = sorted({lr for sweep in sweeps for lr in sweep.losses})
    return min(lrs, key=lambda lr: statistics.fmean(capped(sweep, lr) for sweep in sweeps))


def capped(sweep: Sweep, lr: float) -> float:
    """The excess at a learning rate, at most 1: beyond the grid that of its edge, and between two points a mean."""
    points = [(math.log(at), min(1.0, sweep.excess(loss))) for at, loss in sweep.losses.items()]
    place = math.log(lr)
    if place <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in itertools.pairwise(points):
        if place <= right:
            share = (place - left) / (right - left)
            return (1.0 - share) * low + share * high
    return points[-1][1]
