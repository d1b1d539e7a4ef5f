"""A run, its result, and the file that keeps results for as long as their code stays the same."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import ladder, tasks
from benchmarks.digest import code_digest
from benchmarks.generated import generated
from benchmarks.methods import METHODS
from benchmarks.training import Task


@dataclass(frozen=True)
class Run:
    """One training run."""

    task: str
    method: str
    lr: float
    """The base optimizer's learning rate."""
    seed: int


@dataclass(frozen=True)
class Result:
    """Result of a run."""

    loss: float
    """Final held-out loss; infinite if the run diverged."""
    start: float
    """Held-out loss before the first step."""
    scales: list[tuple[int, float]]
    """Steps, and S after them; empty for a method without S."""
    seconds: float


Results = dict[Run, Result]

_RUN = ("benchmarks.training", "benchmarks.data", "gpt.data", "gpt.optimizers")
_NAMED = ("benchmarks.tasks", "gpt.model", *_RUN)
_LADDER = ("benchmarks.ladder", *_NAMED)
_GENERATED = (
    "benchmarks.generated", "benchmarks.problems", "benchmarks.sequences", "benchmarks.models", *_RUN,
)  # fmt: skip


def task_of(name: str) -> Task:
    """A named task, one of the ladder, or the generated one of ``g`` and a seed."""
    fixed = tasks.TASKS.get(name) or ladder.TASKS.get(name)
    return fixed or generated(int(name.removeprefix("g")))


def digest(run: Run) -> str:
    """What stands for the code of a run: only results with the same count."""
    modules = _NAMED if run.task in tasks.TASKS else _LADDER if run.task in ladder.TASKS else _GENERATED
    return f"{code_digest(*modules)}/{METHODS[run.method].digest}"


def mean_loss(results: Results, task: str, method: str, lr: float, seeds: Sequence[int]) -> float | None:
    """Mean loss over the seeds; ``None`` if one is missing."""
    found = [results.get(Run(task, method, lr, seed)) for seed in seeds]
    return None if None in found else statistics.fmean(result.loss for result in found if result is not None)


def read(file: Path) -> Results:
    """Read a results file: JSON lines. An incomplete last line is ignored, and so are results of other code."""
    results: Results = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        run = Run(*(record.pop(name) for name in ("task", "method", "lr", "seed")))
        if record.get("digest") == digest(run):
            loss = math.inf if record["loss"] is None else record["loss"]
            scales = [(step, scale) for step, scale in record["scales"]]
            results[run] = Result(loss, record["start"], scales, record["seconds"])
    return results


def line(run: Run, result: Result) -> str:
    """The line of a results file for one result."""
    record = {**asdict(run), **asdict(result), "digest": digest(run)}
    if not math.isfinite(result.loss):
        record["loss"] = None
    record["seconds"] = round(result.seconds, 2)
    record["scales"] = [(step, float(f"{scale:.6g}")) for step, scale in result.scales]
    return json.dumps(record) + "\n"
