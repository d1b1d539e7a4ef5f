"""Tables of the results of :mod:`benchmarks.tuning`: by task, and by method over all tasks."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distributions

from benchmarks.fixed_lr import fixed_lrs
from benchmarks.methods import BASE_LRS, FIXED, METHODS, SWEEP, TUNER
from benchmarks.profile import WITHIN, Summary, least_lead, percent, summary
from benchmarks.results import Results, Run, mean_loss, task_of
from benchmarks.sweep import Sweep, sweep_of
from benchmarks.training import Task


@dataclass(frozen=True)
class Row:
    """A task in the table."""

    sweep: Sweep
    excess: dict[str, float]
    """By method: how far its loss, mean over the seeds, lies above the best of the grid."""
    spread: float | None
    """How far the tuner's largest loss over :data:`BASE_LRS` lies above its smallest."""
    noise: float
    """Standard deviation over the seeds of the excess at the sweep's best learning rate."""

    @property
    def task(self) -> Task:
        return self.sweep.task


def rows(results: Results, tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> list[Row]:
    """Rows of the tasks whose sweep is complete."""
    sweeps = [sweep for name in tasks if (sweep := sweep_of(task_of(name), seeds, results)) is not None]
    fixed = fixed_lrs(sweeps) if FIXED in methods else {}
    return [_row(results, sweep, methods, seeds, fixed.get(sweep.task.name)) for sweep in sweeps]


def _row(results: Results, sweep: Sweep, methods: Sequence[str], seeds: Sequence[int], fixed: float | None) -> Row:
    task, found = sweep.task, {}
    for method in methods:
        if method == SWEEP:
            continue
        if method == FIXED:
            loss = None if fixed is None else mean_loss(results, task.name, SWEEP, fixed, seeds)
        else:
            loss = mean_loss(results, task.name, method, METHODS[method].lr(task), seeds)
        if loss is not None:
            found[method] = sweep.excess(loss)
    tuned = [loss for lr in BASE_LRS if (loss := mean_loss(results, task.name, TUNER, lr, seeds)) is not None]
    spread = None
    if len(tuned) == len(BASE_LRS):
        spread = sweep.excess_over(max(tuned), min(tuned))
    own = [sweep.excess(results[Run(task.name, SWEEP, sweep.best_lr, seed)].loss) for seed in seeds]
    return Row(sweep, found, spread, statistics.stdev(own) if len(own) > 1 else 0.0)


def shown(found: Sequence[Row], methods: Sequence[str]) -> list[str]:
    """The methods that have a result, the tuner first."""
    names = [method for method in methods if any(method in row.excess for row in found)]
    return sorted(names, key=lambda name: name != TUNER)


def table(found: Sequence[Row], methods: Sequence[str]) -> str:
    """A Markdown table of the excess by task and method."""
    names = shown(found, methods)
    lines = [
        f"| task | best lr | its loss | ± seeds | {' | '.join(names)} | over base lr |",
        "| --- " * (len(names) + 5) + "|",
    ]
    for row in found:
        cells = [percent(row.excess.get(method)) for method in names]
        start = f"{row.task.what} (`{row.task.name}`) | {row.sweep.best_lr:.3g} | {row.sweep.best:.5g}"
        spread = "" if row.spread is None else f"{100 * row.spread:.2f}%"
        lines.append(f"| {start} | {100 * row.noise:.1f}% | {' | '.join(cells)} | {spread} |")
    return "\n".join(lines)


def pairs(found: Sequence[Row], method: str) -> tuple[list[float], list[float]]:
    """The excess of a method, and of the tuner on the same tasks (none where it has not run on all of them)."""
    with_method = [row.excess for row in found if method in row.excess]
    tuned = [excess[TUNER] for excess in with_method if TUNER in excess]
    return [excess[method] for excess in with_method], tuned if len(tuned) == len(with_method) else []


def summary_table(found: Sequence[Row], methods: Sequence[str]) -> str:
    """A Markdown table by method: each number over its tasks, and in parentheses the tuner's over the same tasks."""
    heads = [f"within {limit:.0%}" for limit in WITHIN]
    lines = [
        f"| method | tasks | median | mean, capped | worst | {' | '.join(heads)} | {TUNER}'s least lead |",
        "| --- " * (len(heads) + 6) + "|",
    ]
    for method in shown(found, methods):
        own, tuned = pairs(found, method)
        cells = _cells(summary(own))
        lead = ""
        if tuned and method != TUNER:
            cells = [f"{cell} ({same})" for cell, same in zip(cells, _cells(summary(tuned)))]
            lead = f"{100 * least_lead(tuned, own):+.0f}%"
        lines.append(f"| {method} | {len(own)} | {' | '.join(cells)} | {lead} |")
    spreads = [row.spread for row in found if row.spread is not None]
    if spreads:
        lines += [
            "",
            f"{TUNER} over base learning rates of {', '.join(f'{lr:g}' for lr in BASE_LRS)}, largest above smallest: "
            f"median {100 * statistics.median(spreads):.2f}%, worst {100 * max(spreads):.2f}%, "
            f"{sum(spread <= 0.02 for spread in spreads)} of {len(spreads)} tasks within 2%.",
        ]
    return "\n".join(lines)


def _cells(found: Summary) -> list[str]:
    excesses = [percent(value) for value in (found.median, found.mean, found.worst)]
    return excesses + [f"{share:.0%}" for share in found.within]


def versions() -> str:
    """Versions of Python and packages, and the machine type."""
    names = ("torch", "mechanic-pytorch", "prodigyopt", "dadaptation", "schedulefree", "scikit-learn")
    found = {distribution.name: distribution.version for distribution in distributions()}
    packages = ", ".join(f"{name} {found[name]}" for name in names if name in found)
    return f"Python {platform.python_version()}, {packages}, {platform.machine()}, one thread a run"
