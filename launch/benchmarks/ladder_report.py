"""Table and figure of the ladder of horizons: excess, best learning rate and S by the number of steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.ladder import LADDERS, Ladder
from benchmarks.methods import FIXED, TUNER
from benchmarks.profile import percent
from benchmarks.results import Results, Run
from benchmarks.training import Task
from benchmarks.tuning_plots import pyplot
from benchmarks.tuning_report import Row
from gpt.optimizers import make_scheduler

_LARGE = 0.9  # of the schedule's largest learning rate


def _factor(task: Task) -> Callable[[int], float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = make_scheduler(optimizer, task.schedule, round(task.warm_up * task.steps), task.steps)
    return scheduler.lr_lambdas[0]


def scales(results: Results, task: Task, seeds: Sequence[int]) -> tuple[float, float] | None:
    """The tuner's S with a base learning rate of 1: where its schedule is large for the last time, and at the end.

    Large is at least 0.9 of the schedule's largest learning rate: the end of a constant one, the start of WSD's decay,
    and a fifth of a cosine. The mean over the seeds is geometric. ``None`` without a result.
    """
    factor = _factor(task)
    found = []
    for seed in seeds:
        result = results.get(Run(task.name, TUNER, 1.0, seed))
        if result is None or not result.scales:
            return None
        large = [scale for step, scale in result.scales if factor(step - 1) >= _LARGE]
        found.append((large[-1] if large else result.scales[0][1], result.scales[-1][1]))
    late, end = (math.exp(statistics.fmean(math.log(value) for value in values)) for values in zip(*found))
    return late, end


def exponent(steps: Sequence[float], values: Sequence[float]) -> float:
    """The power of the steps that ``values`` go with: the slope of their logarithms."""
    return statistics.linear_regression([math.log(at) for at in steps], [math.log(value) for value in values]).slope


def _rungs(found: Sequence[Row], ladder: Ladder) -> list[Row]:
    return [row for row in found if row.task.name in ladder.tasks]


def table(results: Results, found: Sequence[Row], seeds: Sequence[int]) -> str:
    """Markdown tables: each rung, and how learning rates go with the horizon."""
    lines = [
        "| ladder | steps | best lr | S while the lr is large | S at the end | "
        f"S while the lr is large / best lr | {TUNER} | {FIXED} |",
        "| --- " * 8 + "|",
    ]
    slopes = ["| ladder | best lr goes with steps to the | S while the lr is large |", "| --- | --- | --- |"]
    for ladder in LADDERS:
        name, rungs = f"{ladder.model}, {ladder.schedule}", _rungs(found, ladder)
        known = []
        for row in rungs:
            pair = scales(results, row.task, seeds)
            best = row.sweep.best_lr
            cells = ["", "", ""]
            if pair is not None:
                known.append((row.task.steps, pair[0]))
                cells = [f"{pair[0]:.3g}", f"{pair[1]:.3g}", f"{pair[0] / best:.2f}"]
            ends = [percent(row.excess.get(method)) for method in (TUNER, FIXED)]
            lines.append(f"| {name} | {row.task.steps:,} | {best:.3g} | {' | '.join((*cells, *ends))} |")
        if len(rungs) > 1:
            slope = exponent([row.task.steps for row in rungs], [row.sweep.best_lr for row in rungs])
            own = f"{exponent(*zip(*known)):+.2f}" if len(known) > 1 else ""
            slopes.append(f"| {name} | {slope:+.2f} | {own} |")
    return "\n".join((*lines, "", *slopes))


def plot(results: Results, found: Sequence[Row], seeds: Sequence[int], image: Path) -> None:
    """Plot, by ladder, the excess and the learning rates against the number of steps."""
    plots = pyplot()
    figure, axes = plots.subplots(2, len(LADDERS), figsize=(2.6 * len(LADDERS), 5), sharex=True, squeeze=False)
    for column, ladder in enumerate(LADDERS):
        top, bottom = axes[:, column]
        rungs = _rungs(found, ladder)
        for method in (TUNER, FIXED):
            points = [(row.task.steps, 100 * row.excess[method]) for row in rungs if method in row.excess]
            if points:
                top.plot(*zip(*points), "o-", markersize=3, label=method)
        bottom.plot(
            [row.task.steps for row in rungs], [row.sweep.best_lr for row in rungs], "o--", color="tab:gray",
            markersize=3, label="best lr",
        )  # fmt: skip
        known = [(row.task.steps, *pair) for row in rungs if (pair := scales(results, row.task, seeds)) is not None]
        if known:
            steps, late, end = zip(*known)
            bottom.plot(steps, late, "o-", color="tab:blue", markersize=3, label="S while the lr is large")
            bottom.plot(steps, end, "o:", color="tab:cyan", markersize=3, label="S at the end")
        top.set_title(f"{ladder.model}, {ladder.schedule}", fontsize=9)
        bottom.set_xscale("log")
        bottom.set_yscale("log")
        bottom.set_xlabel("steps", fontsize=8)
        for axis in (top, bottom):
            axis.tick_params(which="both", labelsize=7)
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("excess, %", fontsize=8)
    axes[1, 0].set_ylabel("learning rate", fontsize=8)
    for axis in axes[:, 0]:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(image, dpi=110)
    plots.close(figure)
