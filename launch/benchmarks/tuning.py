"""One run against a sweep of the learning rate: selects and executes the runs."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.digest import code_digest, package_version
from benchmarks.generated import generated
from benchmarks.tasks import TASKS
from benchmarks.training import Task, train
from manic import Mechanic, NonfiniteError

SWEEP = "sweep"
"""The reference: the base optimizer at the best of a grid of learning rates."""
TUNER = "multiplicative"
"""The method that also runs at each of :data:`BASE_LRS`."""
BASE_LRS = (1e-6, 1e-3, 1.0, 1e2)
_POINTS = 40  # values of S recorded per run


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
Builder = Callable[[Task, nn.Module, float], list[Any]]


def _mechanic(variant: str) -> Builder:
    return lambda task, model, lr: [Mechanic(task.bases(model, lr), variant=variant)]


class _RebasingMechanic(Mechanic):
    """Mechanic that calls ``rebase()`` each time S has doubled."""

    _last = 0.0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        scale = float(self.scale)
        if scale >= 2.0 * self._last:
            if self._last > 0.0:
                self.rebase()
            self._last = scale
        return loss


def _mechanic_pytorch(task: Task, model: nn.Module, lr: float) -> list[Any]:
    from mechanic_pytorch import mechanize

    (base,) = task.bases(model, lr)
    settings = {name: base.defaults[name] for name in ("betas", "momentum") if name in base.defaults}
    return [mechanize(type(base))(_groups(base), lr=lr, **settings)]


def _prodigy(task: Task, model: nn.Module, lr: float) -> list[Any]:
    from prodigyopt import Prodigy

    (base,) = task.bases(model, lr)
    return [Prodigy(_groups(base), lr=lr, safeguard_warmup=True)]


def _d_adaptation(task: Task, model: nn.Module, lr: float) -> list[Any]:
    import dadaptation

    (base,) = task.bases(model, lr)
    if task.base == "adamw":
        return [dadaptation.DAdaptAdam(_groups(base), lr=lr, decouple=True)]
    if task.base == "lion":
        return [dadaptation.DAdaptLion(_groups(base), lr=lr)]
    return [dadaptation.DAdaptSGD(_groups(base), lr=lr, momentum=base.defaults["momentum"])]


def _schedule_free(task: Task, model: nn.Module, lr: float) -> list[Any]:
    import schedulefree

    (base,) = task.bases(model, lr)
    cls = schedulefree.AdamWScheduleFree if task.base == "adamw" else schedulefree.SGDScheduleFree
    optimizer = cls(_groups(base), lr=lr, warmup_steps=round(task.warm_up * task.steps))
    optimizer.train()
    return [optimizer]


@dataclass(frozen=True)
class Method:
    """A method that needs no sweep, or the sweep itself."""

    build: Builder
    bases: tuple[str, ...] = ("adamw", "sgd", "lion", "muon")
    """The base optimizers that it supports."""
    lrs: dict[str, float] | None = None
    """Its documented learning rate by base optimizer, if it is not 1."""
    keeps_schedule: bool = True
    modules: tuple[str, ...] = ()
    """The code that it consists of, beside the base optimizer."""
    package: str | None = None
    """The distribution that it comes from."""

    @property
    def digest(self) -> str:
        """What stands for the method's code."""
        code = code_digest(*self.modules) if self.modules else ""
        return code + (package_version(self.package) if self.package else "")


_BETTING = ("manic.tuners.mechanic",)
METHODS: dict[str, Method] = {
    SWEEP: Method(lambda task, model, lr: task.bases(model, lr)),
    TUNER: Method(_mechanic(TUNER), modules=("manic.tuners.multiplicative",)),
    "optax": Method(_mechanic("optax"), modules=_BETTING),
    "optax, resets": Method(
        lambda task, model, lr: [_RebasingMechanic(task.bases(model, lr), variant="optax")], modules=_BETTING
    ),
    "pytorch": Method(_mechanic("pytorch"), modules=_BETTING),
    "mechanic-pytorch": Method(_mechanic_pytorch, ("adamw", "sgd", "lion"), package="mechanic-pytorch"),
    "Prodigy": Method(_prodigy, ("adamw",), package="prodigyopt"),
    "D-Adaptation": Method(_d_adaptation, ("adamw", "sgd", "lion"), package="dadaptation"),
    "Schedule-Free": Method(
        _schedule_free, ("adamw", "sgd"), {"adamw": 0.0025, "sgd": 1.0}, keeps_schedule=False, package="schedulefree"
    ),
}
_RUN = ("benchmarks.training", "gpt.data", "gpt.optimizers")
_NAMED = ("benchmarks.tasks", "gpt.model", *_RUN)
_GENERATED = ("benchmarks.generated", "benchmarks.problems", *_RUN)


def task_of(name: str) -> Task:
    """A named task, or the generated one of ``g`` and a seed."""
    return TASKS[name] if name in TASKS else generated(int(name.removeprefix("g")))


def digest(run: Run) -> str:
    """What stands for the code of a run: only results with the same count."""
    return f"{code_digest(*(_NAMED if run.task in TASKS else _GENERATED))}/{METHODS[run.method].digest}"


def _groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [
        {"params": group["params"], "weight_decay": group.get("weight_decay", 0.0)} for group in optimizer.param_groups
    ]


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


def wanted(task: Task, methods: Iterable[str], seeds: Sequence[int], results: Results) -> Iterator[Run]:
    """The runs of a task that the results so far require; more results may extend the grid."""
    for name in methods:
        method = METHODS[name]
        if task.base in method.bases:
            if name == SWEEP:
                lrs: Sequence[float] = grid(task, seeds, results)
            else:
                lrs = BASE_LRS if name == TUNER else [(method.lrs or {}).get(task.base, 1.0)]
            for lr in lrs:
                yield from (Run(task.name, name, lr, seed) for seed in seeds)


def grid(task: Task, seeds: Sequence[int], results: Results) -> list[float]:
    """Learning rates whose losses are wanted, in ascending order; more results may extend it.

    First by factors of 4 until the best is inside, then by 2 around it, until two lie on either side of it.
    """
    powers = [-4, -2, 0, 2, 4]
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
        if record["digest"] == digest(run):
            loss = math.inf if record["loss"] is None else record["loss"]
            scales = [(step, scale) for step, scale in record["scales"]]
            results[run] = Result(loss, record["start"], scales, record["seconds"])
    return results


def _line(run: Run, result: Result) -> str:
    record = {**asdict(run), **asdict(result), "digest": digest(run)}
    if not math.isfinite(result.loss):
        record["loss"] = None
    record["seconds"] = round(result.seconds, 2)
    record["scales"] = [(step, float(f"{scale:.6g}")) for step, scale in result.scales]
    return json.dumps(record) + "\n"


def measure(file: Path, tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int], processes: int) -> Results:
    """Execute the runs missing from ``file``, append their results in order, and return all results.

    Args:
        file: The results file; after an interruption, the next call continues from it.
        tasks: Names for :func:`task_of`.
        methods: Names in :data:`METHODS`.
        seeds: Seeds of models and data.
        processes: Concurrent runs; 1: in this process.

    Returns:
        The results, by run.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    results = read(file)
    if file.exists() and not file.read_text().endswith("\n"):
        with file.open("a") as lines:  # so that the next line is not appended to an incomplete one
            lines.write("\n")
    with ExitStack() as stack:
        pool: Any = None
        if processes > 1:
            pool = stack.enter_context(ProcessPoolExecutor(processes, mp_context=get_context("spawn")))
        while True:
            runs = [run for name in tasks for run in wanted(task_of(name), methods, seeds, results)]
            missing = [run for run in runs if run not in results]
            if not missing:
                return results
            with file.open("a") as lines:
                for run, result in zip(missing, (map if pool is None else pool.map)(execute, missing)):
                    results[run] = result
                    lines.write(_line(run, result))
                    lines.flush()
                    print(
                        f"{len(results)} runs: {run.task}, {run.method}, lr {run.lr:g}, seed {run.seed}: "
                        f"{result.loss:.4f} in {result.seconds:.1f} s",
                        flush=True,
                    )
