"""Host time of a step's Python code: many DTensors of few elements, on one rank of a simulated group."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import AdamW, Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.step import PERIOD, Settled
from manic import Mechanic
from manic.distributed.layout import local

WARM_UP = 5
REFERENCE = "AdamW, fused"
# Shapes of the shards on a rank: so small that kernel time is negligible.
_MATRIX, _VECTOR = (2, 4), (2,)
_IN_BLOCK = [_MATRIX] * 7 + [_VECTOR] * 2


def fused(parameters: Sequence[Tensor]) -> Optimizer:
    return AdamW(parameters, lr=1.0, weight_decay=0.1, fused=True)


def _mechanic(**options: Any) -> Callable[[Sequence[Tensor]], Optimizer]:
    return lambda parameters: Mechanic(fused(parameters), **options)


def _settled(**options: Any) -> Callable[[Sequence[Tensor]], Optimizer]:
    return lambda parameters: Mechanic(fused(parameters), variant=Settled(), **options)


METHODS: dict[str, Callable[[Sequence[Tensor]], Optimizer]] = {
    REFERENCE: fused,
    "Mechanic(AdamW), after 1,000 steps": _settled(),
    'Mechanic(AdamW), after 1,000 steps, nonfinite="ignore"': _settled(nonfinite="ignore"),
    "Mechanic(AdamW)": _mechanic(),
    'Mechanic(AdamW), nonfinite="ignore"': _mechanic(nonfinite="ignore"),
    'Mechanic(AdamW), variant="optax"': _mechanic(variant="optax"),
    'Mechanic(AdamW), variant="optax", nonfinite="ignore"': _mechanic(variant="optax", nonfinite="ignore"),
    'Mechanic(AdamW), variant="pytorch"': _mechanic(variant="pytorch"),
}


@dataclass
class Cost:
    """Cost of one method."""

    seconds: float | None = None
    """Host time of a step; ``None`` if the method raised."""
    error: str | None = None
    """The error that it raised."""


class Run:
    """One method on its parameters, sharded as FSDP2 shards a Llama-like model over a mesh of one dimension.

    Args:
        method: A name in :data:`METHODS`.
        mesh: The mesh to shard over.
        layers: Number of blocks, each of seven matrices and two norms, besides embedding, norm and head.
    """

    def __init__(self, method: str, mesh: DeviceMesh, layers: int) -> None:
        self._generator = torch.Generator().manual_seed(0)
        shapes = [_MATRIX, *_IN_BLOCK * layers, _VECTOR, _MATRIX]
        self._mesh = mesh
        self._parameters = [nn.Parameter(self._sharded(self._random(shape))) for shape in shapes]
        self.seconds: list[float] = []
        self.error: str | None = None
        """The error that the method raised; shown in its row of the table."""
        try:
            self._optimizer = METHODS[method](self._parameters)
        except Exception as error:
            self.error = _name(error)

    def step(self) -> None:
        """Run and time a step, unless the method has raised before."""
        if self.error is not None:
            return
        for parameter in self._parameters:  # as backward, which creates a new DTensor each time
            parameter.grad = self._sharded(1e-3 * self._random(local(parameter).shape))
        start = time.perf_counter()
        try:
            self._optimizer.step()
        except Exception as error:
            self.error = _name(error)
        self.seconds.append(time.perf_counter() - start)

    def _random(self, shape: Sequence[int]) -> torch.Tensor:
        return torch.randn(tuple(shape), generator=self._generator)

    def _sharded(self, shard: Tensor) -> DTensor:
        return DTensor.from_local(shard, self._mesh, [Shard(0)], run_check=False)


def _name(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def count(layers: int) -> int:
    """Number of parameter tensors of a model with ``layers`` blocks."""
    return len(_IN_BLOCK) * layers + 3


def measure(methods: Sequence[str], layers: int, world_size: int, repeats: int) -> dict[str, Cost]:
    """Measure all methods in this process; their steps alternate, so that noise of the machine affects all equally.

    Args:
        methods: Names in :data:`METHODS`.
        layers: Number of blocks.
        world_size: Number of ranks that torch's fake backend simulates; this process is rank 0.
        repeats: Timed steps of each method, after :data:`WARM_UP`.

    Returns:
        The costs, by method.
    """
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("shard",))
        runs = {method: Run(method, mesh, layers) for method in methods}
        for _ in range(WARM_UP + repeats):
            for run in runs.values():
                run.step()
        return {
            method: Cost(error=run.error) if run.error else Cost(seconds=_of_a_step(run.seconds[WARM_UP:]))
            for method, run in runs.items()
        }
    finally:
        dist.destroy_process_group()


def _of_a_step(seconds: Sequence[float]) -> float:
    """The median over periods, since a settled tuner sums in one step of each."""
    return statistics.median(statistics.fmean(seconds[at : at + PERIOD]) for at in range(0, len(seconds), PERIOD))


def ratio(costs: dict[str, Cost], method: str) -> float | None:
    """A method's time over the reference's; ``None`` if either raised."""
    of_method, of_reference = costs[method].seconds, costs[REFERENCE].seconds
    return None if of_method is None or of_reference is None else of_method / of_reference


def as_json(costs: dict[str, Cost]) -> dict[str, Any]:
    """The costs with their ratio to the reference."""
    return {method: {**asdict(cost), "ratio": ratio(costs, method)} for method, cost in costs.items()}


def table(costs: dict[str, Cost]) -> str:
    """A Markdown table of the costs."""
    lines = ["| | host time of a step | over fused AdamW |", "| --- | --- | --- |"]
    for method, cost in costs.items():
        if cost.seconds is None:
            first_line = str(cost.error).splitlines()[0].replace("|", "\\|")
            lines.append(f"| {method} | raises {first_line} | |")
        else:
            over = ratio(costs, method)
            lines.append(f"| {method} | {1e3 * cost.seconds:.2f} ms | {'' if over is None else f'{over:.2f}'} |")
    return "\n".join(lines)
