"""One run against a sweep of the learning rate: selects and executes the runs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.fixed_lr import fixed_lrs
from benchmarks.methods import BASE_LRS, FIXED, METHODS, SWEEP, TUNER
from benchmarks.results import Result, Results, Run, line, read, task_of
from benchmarks.sweep import grid, sweep_of
from benchmarks.training import Task, train
from manic import Mechanic, NonfiniteError

_POINTS = 40  # values of S recorded per run


def execute(run: Run) -> Result:
    """Execute a run on one thread."""
    torch.set_num_threads(1)
    task, method = task_of(run.task), METHODS[run.method]
    problem = task.problem(run.seed)
    optimizers = method.build(task, problem.model, run.lr)
    scales: list[tuple[int, float]] = []

    def record_scale(step: int) -> None:
        if isinstance(optimizers[0], Mechanic) and step % max(1, task.steps // _POINTS) == 0:
            scales.append((step, float(optimizers[0].scale)))

    first_loss, start = problem.mean_loss(), time.perf_counter()
    try:
        loss = train(task, problem, optimizers, task.schedule if method.keeps_schedule else None, record_scale)
    except NonfiniteError:
        loss = math.inf
    return Result(loss, first_loss, scales, time.perf_counter() - start)


def wanted(
    task: Task, methods: Iterable[str], seeds: Sequence[int], results: Results, base_lrs: Sequence[float] = BASE_LRS
) -> Iterator[Run]:
    """The runs of a task that the results so far require; more results may extend the grid."""
    names = dict.fromkeys(SWEEP if name == FIXED else name for name in methods)
    for name in names:
        method = METHODS[name]
        if method.supports(task):
            if name == SWEEP:
                lrs: Sequence[float] = grid(task, seeds, results)
            else:
                lrs = base_lrs if name == TUNER else [method.lr(task)]
            for lr in lrs:
                yield from (Run(task.name, name, lr, seed) for seed in seeds)


def missing(
    tasks: Sequence[Task], methods: Sequence[str], seeds: Sequence[int], results: Results, base_lrs: Sequence[float]
) -> list[Run]:
    """The runs to make next: those of each task, and once all grids are complete, the ones at a fixed learning rate."""
    runs = [run for task in tasks for run in wanted(task, methods, seeds, results, base_lrs) if run not in results]
    if not runs and FIXED in methods:
        sweeps = [sweep for task in tasks if (sweep := sweep_of(task, seeds, results)) is not None]
        fixed = [Run(name, SWEEP, lr, seed) for name, lr in fixed_lrs(sweeps).items() for seed in seeds]
        runs = [run for run in fixed if run not in results]
    return runs


def measure(
    file: Path,
    tasks: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    processes: int,
    base_lrs: Sequence[float] = BASE_LRS,
) -> Results:
    """Execute the runs missing from ``file``, append their results in order, and return all results.

    Args:
        file: The results file; after an interruption, the next call continues from it.
        tasks: Names for :func:`~benchmarks.results.task_of`.
        methods: Names in :data:`~benchmarks.methods.METHODS`, and :data:`~benchmarks.methods.FIXED`.
        seeds: Seeds of models and data.
        processes: Concurrent runs; 1: in this process.
        base_lrs: The tuner's base learning rates.

    Returns:
        The results, by run.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    results = read(file)
    if file.exists() and not file.read_text().endswith("\n"):
        with file.open("a") as lines:  # so that the next line is not appended to an incomplete one
            lines.write("\n")
    found = [task_of(name) for name in tasks]
    with ExitStack() as stack:
        pool: Any = None
        if processes > 1:
            pool = stack.enter_context(ProcessPoolExecutor(processes, mp_context=get_context("spawn")))
        while runs := missing(found, methods, seeds, results, base_lrs):
            with file.open("a") as lines:
                for run, result in zip(runs, (map if pool is None else pool.map)(execute, runs)):
                    results[run] = result
                    lines.write(line(run, result))
                    lines.flush()
                    print(
                        f"{len(results)} runs: {run.task}, {run.method}, lr {run.lr:g}, seed {run.seed}: "
                        f"{result.loss:.4f} in {result.seconds:.1f} s",
                        flush=True,
                    )
    return results
