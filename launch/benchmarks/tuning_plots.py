"""Figures of the results of :mod:`benchmarks.tuning`: losses and scales by task, and profiles over all tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fixed_lr import FAMILIES
from benchmarks.methods import TUNER
from benchmarks.profile import share_within
from benchmarks.results import Results, Run, mean_loss
from benchmarks.tuning_report import Row, shown

_COLORS = {TUNER: "tab:blue", "optax": "tab:orange", "Prodigy": "tab:green"}
_PLACES = [0.001 * place for place in range(-20, 20)] + [0.02 * 50 ** (step / 200) for step in range(201)]


def pyplot() -> Any:
    """matplotlib without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    return found


def plot(results: Results, found: Sequence[Row], seeds: Sequence[int], image: Path) -> None:
    """Plot, by task, loss against learning rate for the sweep and the tuners, and S over the steps."""
    plots = pyplot()
    columns = 4
    blocks = math.ceil(len(found) / columns)
    figure, axes = plots.subplots(2 * blocks, columns, figsize=(3.4 * columns, 4.6 * blocks), squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    for index, row in enumerate(found):
        block, column = divmod(index, columns)
        top, bottom = axes[2 * block, column], axes[2 * block + 1, column]
        _losses(top, results, row, seeds)
        _scales(bottom, results, row, seeds)
        for axis in (top, bottom):
            axis.set_visible(True)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
        if column == 0:
            top.set_ylabel("held-out loss", fontsize=8)
            bottom.set_ylabel("S, and the best lr", fontsize=8)
        top.set_xlabel("lr", fontsize=7)
        bottom.set_xlabel("step", fontsize=7)
    lines = {line.get_label(): line for axis in axes[::2].flat for line in axis.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="upper center", ncols=len(lines), fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.1 / blocks))
    figure.savefig(image, dpi=100)
    plots.close(figure)


def sweeps(results: Results, found: Sequence[Row], seeds: Sequence[int], image: Path) -> None:
    """Plot one run of the tuner beside the sweep, on six tasks: nearest, farthest, and evenly between by rank."""
    plots = pyplot()
    ranked = sorted((row for row in found if TUNER in row.excess), key=lambda row: row.excess[TUNER])
    shown = [ranked[round(place * (len(ranked) - 1) / 5)] for place in range(6)]
    figure, axes = plots.subplots(2, 3, figsize=(10, 5.2))
    for axis, row in zip(axes.flat, shown):
        _losses(axis, results, row, seeds, [TUNER])
        excess = row.excess[TUNER]
        kind = f"{row.task.what.split(',')[0]}, {row.task.base}"
        rank = f"{ranked.index(row) + 1} of {len(ranked)}: {excess:+.1%}"
        axis.set_title(f"{rank}\n{kind}", fontsize=9)
        axis.set_xlabel("lr of the sweep", fontsize=8)
        axis.tick_params(labelsize=7, which="both")
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("held-out loss", fontsize=8)
    lines = axes[0, 0].get_lines()
    figure.legend(lines, ["runs of the sweep", "one run of manic"], loc="upper center", ncols=2, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(image, dpi=120)
    plots.close(figure)


def _losses(
    axis: Any, results: Results, row: Row, seeds: Sequence[int], methods: Iterable[str] = tuple(_COLORS)
) -> None:
    from matplotlib.ticker import NullFormatter

    losses = row.sweep.losses
    axis.plot(losses.keys(), losses.values(), "o-", color="tab:gray", markersize=3, label="sweep")
    for method in methods:
        color = _COLORS[method]
        loss = mean_loss(results, row.task.name, method, 1.0, seeds)
        if loss is not None:
            axis.axhline(loss, color=color, linewidth=1.2, label=method)
    tuned = mean_loss(results, row.task.name, TUNER, 1.0, seeds)
    inside = [loss for loss in (*losses.values(), tuned) if loss is not None and loss <= row.sweep.start]
    low, high = min(inside), max(inside)
    if low < 0.1 * high:
        axis.set_yscale("log")
        axis.set_ylim(max(0.7 * low, 1e-12 * high), 1.5 * high)
    else:
        axis.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    axis.set_xscale("log")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_title(row.task.name, fontsize=9)


def _scales(axis: Any, results: Results, row: Row, seeds: Sequence[int]) -> None:
    from matplotlib.ticker import NullFormatter

    for method in (TUNER, "optax"):
        for seed in seeds:
            result = results.get(Run(row.task.name, method, 1.0, seed))
            if result is not None and result.scales:
                axis.plot(*zip(*result.scales), color=_COLORS[method], linewidth=0.8)
    axis.axhline(row.sweep.best_lr, color="tab:gray", linestyle="--", linewidth=1)
    axis.set_yscale("log")
    axis.yaxis.set_minor_formatter(NullFormatter())


def profile(found: Sequence[Row], methods: Sequence[str], image: Path) -> None:
    """Plot the share of tasks within x of the grid's best by method, and the best learning rates by family."""
    plots = pyplot()
    figure, (left, right) = plots.subplots(1, 2, figsize=(12, 4.6), width_ratios=(3, 2))
    for method in shown(found, methods):
        excesses = [row.excess[method] for row in found if method in row.excess]
        shares = [share_within(excesses, place) for place in _PLACES]
        width = 2.4 if method == TUNER else 1.2
        left.plot(_PLACES, shares, linewidth=width, label=f"{method} ({len(excesses)} tasks)")
    left.set_xscale("symlog", linthresh=0.02, linscale=0.6)
    ticks = (-0.02, -0.01, 0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    left.set_xticks(ticks, [f"{100 * tick:g}%" for tick in ticks], fontsize=8)
    left.set_xticks([], minor=True)
    left.set_xlim(-0.02, 1.0)
    left.set_ylim(0.0, 1.02)
    left.set_xlabel("excess over the best of the grid")
    left.set_ylabel("share of tasks within it")
    if found:
        left.legend(fontsize=8, loc="lower right")
    _best_lrs(right, found)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(image, dpi=120)
    plots.close(figure)


def _best_lrs(axis: Any, found: Sequence[Row]) -> None:
    by_family: dict[str, list[float]] = {}
    for row in found:
        by_family.setdefault(FAMILIES[row.task.base], []).append(row.sweep.best_lr)
    names = [name for name in dict.fromkeys(FAMILIES.values()) if name in by_family]
    labels = []
    for place, name in enumerate(names):
        lrs = sorted(by_family[name])
        beside = [place + 0.3 * (index % 7 - 3) / 3 for index in range(len(lrs))]
        axis.scatter(beside, lrs, s=14, alpha=0.7)
        labels.append(f"{name}\n{len(lrs)} tasks\n{math.log10(lrs[-1] / lrs[0]):.1f} decades")
    axis.set_xticks(range(len(names)), labels, fontsize=8)
    axis.set_yscale("log")
    axis.set_ylabel("best learning rate of the grid")
