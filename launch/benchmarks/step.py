"""Cost of an optimizer's step relative to fused AdamW: time, bytes, memory, launches, collectives and host syncs."""

from __future__ import annotations

import gc
import os
import statistics
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.counting import CallCounter
from benchmarks.host_memory import held, peak, reset_peak
from manic import Mechanic
from manic.step.deferral import Deferral
from manic.step.guard import Reading
from manic.testing import run
from manic.tuners.multiplicative import Multiplicative

Shapes = list[tuple[int, ...]]
WARM_UP = 4
PERIOD = 4
"""Steps of which the mean is taken: a settled tuner sums in one of them."""


def gpt_shapes(width: int, layers: int) -> Shapes:
    """The shapes of launch/gpt/model.py's parameters."""
    block: Shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)] + [(width,)] * 4
    return [(256, width), *block * layers, (width,), (width,), (256, width)]


SIZES: dict[str, Shapes] = {
    "1M": gpt_shapes(128, 5),
    "25M": gpt_shapes(512, 8),
    "124M": gpt_shapes(768, 17),
    "1B": gpt_shapes(2048, 20),
    "10k-small": [(1000,)] * 10_000,
}


def fused(parameters: Sequence[Tensor]) -> Optimizer:
    return AdamW(parameters, lr=1.0, weight_decay=0.1, fused=True)


def foreach(parameters: Sequence[Tensor]) -> Optimizer:
    return AdamW(parameters, lr=1e-3, weight_decay=0.1, foreach=True)


def _mechanic(**options: Any) -> Callable[[Sequence[Tensor]], Optimizer]:
    return lambda parameters: Mechanic(fused(parameters), **options)


class Settled(Multiplicative):
    """The default tuner as it is after its first thousand steps: it sums in one of four steps from the start."""

    name = "settled"
    rests = (0, Multiplicative.rests[1])


class _KnownNorm:
    """Mechanic that is handed the norm of the gradients in each step."""

    def __init__(self, optimizer: Mechanic) -> None:
        self._optimizer = optimizer

    def step(self) -> None:
        self._optimizer.step(grad_norm=1.0)


def _settled(**options: Any) -> Callable[[Sequence[Tensor]], Optimizer]:
    return lambda parameters: Mechanic(fused(parameters), variant=Settled(), **options)


def _settled_known_norm(parameters: Sequence[Tensor]) -> Any:
    return _KnownNorm(Mechanic(fused(parameters), variant=Settled()))


def _known_norm(parameters: Sequence[Tensor]) -> Any:
    return _KnownNorm(Mechanic(fused(parameters)))


def mechanic_pytorch(parameters: Sequence[Tensor]) -> Optimizer:
    from mechanic_pytorch import mechanize

    return mechanize(AdamW)(parameters, lr=1.0, weight_decay=0.1, fused=True)


def prodigy(parameters: Sequence[Tensor]) -> Optimizer:
    from prodigyopt import Prodigy

    return Prodigy(parameters, lr=1.0, weight_decay=0.1)


def d_adaptation(parameters: Sequence[Tensor]) -> Optimizer:
    from dadaptation import DAdaptAdam

    return DAdaptAdam(parameters, lr=1.0, weight_decay=0.1, decouple=True)


def schedule_free(parameters: Sequence[Tensor]) -> Optimizer:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(parameters, lr=1e-3, weight_decay=0.1)
    optimizer.train()
    return optimizer


METHODS: dict[str, Callable[[Sequence[Tensor]], Any]] = {
    "AdamW, fused": fused,
    "AdamW, foreach": foreach,
    "Mechanic(AdamW), after 1,000 steps": _settled(),
    "Mechanic(AdamW), after 1,000 steps, step(grad_norm=...)": _settled_known_norm,
    'Mechanic(AdamW), after 1,000 steps, nonfinite="skip"': _settled(nonfinite="skip"),
    'Mechanic(AdamW), after 1,000 steps, nonfinite="ignore"': _settled(nonfinite="ignore"),
    "Mechanic(AdamW)": _mechanic(),
    "Mechanic(AdamW), step(grad_norm=...)": _known_norm,
    'Mechanic(AdamW), nonfinite="skip"': _mechanic(nonfinite="skip"),
    'Mechanic(AdamW), nonfinite="ignore"': _mechanic(nonfinite="ignore"),
    'Mechanic(AdamW), variant="optax"': _mechanic(variant="optax"),
    'Mechanic(AdamW), variant="optax", nonfinite="ignore"': _mechanic(variant="optax", nonfinite="ignore"),
    'Mechanic(AdamW), variant="optax", store_delta=False': _mechanic(variant="optax", store_delta=False),
    'Mechanic(AdamW), variant="optax", store_delta=False, nonfinite="ignore"': _mechanic(
        variant="optax", store_delta=False, nonfinite="ignore"
    ),
    'Mechanic(AdamW), variant="optax", update="snapshot"': _mechanic(variant="optax", update="snapshot"),
    'Mechanic(AdamW), variant="pytorch"': _mechanic(variant="pytorch"),
    "mechanic-pytorch": mechanic_pytorch,
    "Prodigy": prodigy,
    "D-Adaptation": d_adaptation,
    "Schedule-Free": schedule_free,
}
REFERENCE = "AdamW, fused"


@dataclass
class Cost:
    """Cost of one method."""

    seconds: float
    """Median duration of a step, each a mean of :data:`PERIOD` steps."""
    moved: float
    """Bytes per parameter that a step's operators read and write, by the sizes of their arguments."""
    at_rest: float
    """Bytes per parameter that the optimizer holds between steps, without parameters and gradients."""
    at_peak: float
    """Peak bytes per parameter during a step, without parameters and gradients."""
    collectives: int
    """Collectives per step on two ranks."""
    operators: float
    """Kernel launches per step on CUDA, operators other than views on a CPU; on one rank."""
    syncs: float
    """Host syncs per step."""


def make_parameters(shapes: Shapes, device: torch.device) -> list[Tensor]:
    """Parameters with gradients."""
    generator = torch.Generator(device).manual_seed(0)
    parameters = []
    for shape in shapes:
        parameter = torch.randn(shape, generator=generator, device=device).requires_grad_()
        parameter.grad = 1e-3 * torch.randn(shape, generator=generator, device=device)
        parameters.append(parameter)
    return parameters


def count_collectives(method: str) -> int:
    """Collectives of one step after the warm-up; called on every rank."""
    optimizer = METHODS[method](make_parameters(SIZES["1M"][:3], torch.device("cpu")))
    for _ in range(WARM_UP):
        optimizer.step()
    with CallCounter() as calls:
        optimizer.step()
    return calls.counts["collectives"]


def serve(pipe: Connection, method: str, shapes: Shapes, device_name: str, threads: int) -> None:
    """Main function of one method's process: run a step for each request, and send its duration in seconds."""
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    cuda = device.type == "cuda"
    parameters = make_parameters(shapes, device)
    size = sum(parameter.numel() for parameter in parameters)
    before = torch.cuda.memory_allocated() if cuda else held()
    optimizer = METHODS[method](parameters)
    for _ in range(WARM_UP):
        optimizer.step()
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        rest = torch.cuda.memory_allocated()
        optimizer.step()
        most = torch.cuda.max_memory_allocated()
    else:
        rest = reset_peak()
        optimizer.step()
        most = peak()
    pipe.send(None)
    while _step_requested(pipe):
        optimizer.step()  # the first finds the caches filled by another method
        seconds = 0.0
        for _ in range(PERIOD):
            for parameter in parameters:  # with a constant gradient, a learned rate grows without bound
                assert parameter.grad is not None
                parameter.grad.neg_()
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            optimizer.step()
            if cuda:
                torch.cuda.synchronize()
            seconds += time.perf_counter() - start
        pipe.send(seconds / PERIOD)
    # Counted after the timed steps: the mode slows a step down.
    tolist, read = Tensor.tolist, Deferral.read

    def counted(tensor: Tensor) -> Any:  # a host sync that does not dispatch an operator
        calls.counts["syncs"] += 1
        return tolist(tensor)

    def uncounted(deferral: Deferral) -> Reading:  # of a step before; a GPU has copied it to the host by then
        syncs, reading = calls.counts["syncs"], read(deferral)
        calls.counts["syncs"] = syncs
        return reading

    patches = mock.patch.object(Tensor, "tolist", counted), mock.patch.object(Deferral, "read", uncounted)
    with CallCounter() as calls, patches[0], patches[1]:
        for _ in range(PERIOD):
            optimizer.step()
    launches = _cuda_launches(optimizer) if cuda else calls.counts["operators"]
    pipe.send({
        "at_rest": (rest - before) / size, "at_peak": (most - before) / size,
        "operators": launches / PERIOD, "syncs": calls.counts["syncs"] / PERIOD,
        "moved": calls.counts["bytes"] / PERIOD / size,
    })  # fmt: skip


def _step_requested(pipe: Connection) -> bool:
    """Wait for a request to run a step; False if the requests have ended or the other process has."""
    try:
        return bool(pipe.recv())
    except EOFError:
        return False


def _cuda_launches(optimizer: Optimizer) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PERIOD):
            optimizer.step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if "LaunchKernel" in event.key)


def measure(methods: Sequence[str], size: str, repeats: int, device: torch.device) -> dict[str, Cost]:
    """Measure each method in a process; their steps alternate, so that noise of the machine affects all equally."""
    context = multiprocessing.get_context("spawn")
    threads = torch.get_num_threads()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    pipes: dict[str, Connection] = {}
    processes = []
    counts: dict[str, dict[str, float]] = {}
    try:
        for method in methods:
            pipes[method], theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, method, SIZES[size], str(device), threads))
            process.start()
            theirs.close()  # so that the death of the child is an EOFError here
            processes.append(process)
            pipes[method].recv()
        seconds: dict[str, list[float]] = {method: [] for method in methods}
        for _ in range(repeats):
            for method, pipe in pipes.items():
                pipe.send(True)
                seconds[method].append(pipe.recv())
        for method, pipe in pipes.items():
            pipe.send(False)
            counts[method] = pipe.recv()
    finally:
        for pipe in pipes.values():
            pipe.close()  # ends processes that wait for a request
        for process in processes:
            process.join(timeout=10)
            process.kill()
    return {
        method: Cost(
            seconds=statistics.median(seconds[method]),
            collectives=max(run(count_collectives, 2, method, timeout=300)),
            **counts[method],
        )
        for method in methods
    }


def latency_left(size: str, delay: float, repeats: int) -> tuple[float, float]:
    """Measure a step with a delayed all_reduce, to show the part of its latency that the step does not hide.

    Args:
        size: A name in :data:`SIZES`.
        delay: Duration of the delayed all_reduce in seconds.
        repeats: Steps of each kind; they alternate.

    Returns:
        Median seconds of a step with an immediate all_reduce, and with the delayed one.
    """
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        optimizer = Mechanic(fused(make_parameters(SIZES[size], torch.device("cpu"))), nonfinite="ignore")
        optimizer.step()
        now = time.perf_counter
        all_reduce = dist.all_reduce

        def delayed(*args: Any, **kwargs: Any) -> Any:
            work, due = all_reduce(*args, **kwargs), now() + delay
            return mock.Mock(wait=lambda: (time.sleep(max(0.0, due - now())), work.wait()))

        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(repeats):
            for late, function in ((False, all_reduce), (True, delayed)):
                with mock.patch.object(dist, "all_reduce", function):
                    start = now()
                    optimizer.step()
                    seconds[late].append(now() - start)
        return statistics.median(seconds[False]), statistics.median(seconds[True])
    finally:
        dist.destroy_process_group()


def as_json(costs: dict[str, Cost]) -> dict[str, Any]:
    """The costs with their ratio to the reference."""
    return {
        method: {**asdict(cost), "ratio": cost.seconds / costs[REFERENCE].seconds} for method, cost in costs.items()
    }


def table(costs: dict[str, Cost], device: torch.device) -> str:
    """A Markdown table of the costs."""
    unit = "launches" if device.type == "cuda" else "operators"
    heads = [
        "", "step", "over fused AdamW", "B/param moved", "at rest", "at peak", unit, "all_reduces", "host syncs",
    ]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for method, cost in costs.items():
        cells = [
            method, f"{1e3 * cost.seconds:.1f} ms", f"{cost.seconds / costs[REFERENCE].seconds:.2f}",
            f"{cost.moved:.1f}", f"{cost.at_rest:.1f}", f"{cost.at_peak:.1f}", f"{cost.operators:g}",
            str(cost.collectives), f"{cost.syncs:g}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(costs: dict[str, Cost], title: str, path: str) -> None:
    """Plot the ratios as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.45 * len(costs) + 1), layout="constrained")
    names = list(costs)[::-1]
    ratios = [costs[name].seconds / costs[REFERENCE].seconds for name in names]
    bars = axes.barh(names, ratios, color=["#3566a8" if name.startswith("Mechanic(") else "#a0a0a0" for name in names])
    axes.bar_label(bars, [f" {ratio:.2f}" for ratio in ratios])
    figure.suptitle(textwrap.fill(title, 70), fontsize="medium")
    figure.supxlabel("time of a step, in steps of fused AdamW", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
