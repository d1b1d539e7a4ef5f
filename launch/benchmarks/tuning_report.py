"""Table and plot of the results of :mod:`benchmarks.tuning`."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from benchmarks.tasks import TASKS
from benchmarks.training import Task
from benchmarks.tuning import BASE_LRS, METHODS, SWEEP, TUNER, Results, Run, grid, mean_loss


@dataclass(frozen=True)
class Row:
    """A task in the table."""

    task: Task
    best_lr: float
    best_loss: float
    excess: dict[str, float]
    """By method: its loss, mean over the seeds, relative to the best of the grid, minus 1."""
    spread: float | None
    """The tuner's largest loss over :data:`BASE_LRS`, relative to its smallest, minus 1."""
    noise: float
    """Standard deviation over the seeds of the loss at the sweep's best learning rate, relative to that loss."""


def rows(results: Results, tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> list[Row]:
    """Rows of the tasks whose sweep is complete."""
    found = []
    for name in tasks:
        task = TASKS[name]
        losses = {lr: mean_loss(results, name, SWEEP, lr, seeds) for lr in grid(task, seeds, results)}
        if None in losses.values():
            continue
        best_lr, best = min(((lr, loss) for lr, loss in losses.items() if loss is not None), key=lambda pair: pair[1])
        excess = {}
        for method in methods:
            lr = (METHODS[method].lrs or {}).get(task.base, 1.0)
            loss = mean_loss(results, name, method, lr, seeds)
            if method != SWEEP and loss is not None:
                excess[method] = loss / best - 1.0
        tuned = [loss for lr in BASE_LRS if (loss := mean_loss(results, name, TUNER, lr, seeds)) is not None]
        spread = max(tuned) / min(tuned) - 1.0 if len(tuned) == len(BASE_LRS) else None
        best_losses = [results[Run(name, SWEEP, best_lr, seed)].loss for seed in seeds]
        noise = statistics.stdev(best_losses) / best if len(best_losses) > 1 else 0.0
        found.append(Row(task, best_lr, best, excess, spread, noise))
    return found


def table(found: Sequence[Row], methods: Sequence[str]) -> str:
    """A Markdown table: excess in percent by task and method, then each method's median and worst over its tasks."""
    shown = [method for method in methods if method != SWEEP and any(method in row.excess for row in found)]
    lines = [
        f"| task | best lr | its loss | ± seeds | {' | '.join(shown)} | over base lr |",
        "| --- " * (len(shown) + 5) + "|",
    ]
    for row in found:
        cells = [_percent(row.excess.get(method)) for method in shown]
        start = (
            f"{row.task.what} (`{row.task.name}`) | {row.best_lr:.3g} | {row.best_loss:.4f} | {100 * row.noise:.1f}%"
        )
        spread = "" if row.spread is None else f"{100 * row.spread:.2f}%"
        lines.append(f"| {start} | {' | '.join(cells)} | {spread} |")
    for name, summary in (("median", statistics.median), ("worst", max)):
        cells = [_percent(summary([row.excess[method] for row in found if method in row.excess])) for method in shown]
        spreads = [row.spread for row in found if row.spread is not None]
        spread = f"{100 * summary(spreads):.2f}%" if spreads else ""
        lines.append(f"| **{name}** | | | | {' | '.join(cells)} | {spread} |")
    for name, summary in (("median", statistics.median), ("worst", max)):
        cells = []
        for method in shown:
            same = [row.excess[TUNER] for row in found if {method, TUNER} <= row.excess.keys()]
            cells.append(_percent(summary(same)) if same else "")
        lines.append(f"| {TUNER} on the same tasks, {name} | | | | {' | '.join(cells)} | |")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    if share is None:
        return ""
    return "broke" if math.isinf(share) else f"{100 * share:+.1f}%"


def versions() -> str:
    """Versions of Python and packages, and the machine type."""
    names = ("torch", "mechanic-pytorch", "prodigyopt", "dadaptation", "schedulefree", "scikit-learn")
    found = {distribution.name: distribution.version for distribution in distributions()}
    packages = ", ".join(f"{name} {found[name]}" for name in names if name in found)
    return f"Python {platform.python_version()}, {packages}, {platform.machine()}, one thread a run"


def plot(results: Results, found: Sequence[Row], seeds: Sequence[int], image: Path) -> None:
    """Plot, by task, loss against learning rate for the sweep and the tuners, and S over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    columns = 4
    blocks = math.ceil(len(found) / columns)
    figure, axes = pyplot.subplots(2 * blocks, columns, figsize=(3.4 * columns, 4.6 * blocks), squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    for index, row in enumerate(found):
        block, column = divmod(index, columns)
        top, bottom = axes[2 * block, column], axes[2 * block + 1, column]
        top.set_visible(True)
        bottom.set_visible(True)
        name = row.task.name
        lrs = grid(row.task, seeds, results)
        losses = [mean_loss(results, name, SWEEP, lr, seeds) for lr in lrs]
        top.plot(lrs, losses, "o-", color="tab:gray", markersize=3, label="sweep")
        for method, color in ((TUNER, "tab:blue"), ("optax", "tab:orange"), ("Prodigy", "tab:green")):
            loss = mean_loss(results, name, method, 1.0, seeds)
            if loss is not None:
                top.axhline(loss, color=color, linewidth=1.2, label=method)
        tuned = mean_loss(results, name, TUNER, 1.0, seeds)
        inside = [loss for loss in (*losses, tuned) if loss is not None and math.isfinite(loss)]
        margin = 0.1 * (max(inside) - min(inside))
        top.set_ylim(min(inside) - margin, max(inside) + margin)
        top.set_xscale("log")
        top.set_title(name, fontsize=9)
        for method, color in ((TUNER, "tab:blue"), ("optax", "tab:orange")):
            for seed in seeds:
                result = results.get(Run(name, method, 1.0, seed))
                if result is not None and result.scales:
                    bottom.plot(*zip(*result.scales), color=color, linewidth=0.8)
        bottom.axhline(row.best_lr, color="tab:gray", linestyle="--", linewidth=1)
        bottom.set_yscale("log")
        for axis in (top, bottom):
            axis.tick_params(labelsize=7)
        for axis in (top.xaxis, bottom.yaxis):
            axis.set_minor_formatter(NullFormatter())
        for axis in (top, bottom):
            axis.grid(alpha=0.3)
        if column == 0:
            top.set_ylabel("held-out loss", fontsize=8)
            bottom.set_ylabel("S, and the best lr", fontsize=8)
        top.set_xlabel("lr", fontsize=7)
        bottom.set_xlabel("step", fontsize=7)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(image, dpi=100)
    pyplot.close(figure)
