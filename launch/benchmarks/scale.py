"""Cost of a step on one rank of many, without hardware: fake process group, meta tensors.

Runs the step of rank 0 of a Llama-3-shaped model: counts its allocations, operators and collectives and measures its
host time, but computes no values. Speeds of devices and networks are not included.
"""

from __future__ import annotations

import math
import statistics
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.optim import AdamW, Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.counting import CallCounter
from manic import Mechanic


@dataclass(frozen=True)
class Llama:
    """Widths of a model: Grattafiori et al., The Llama 3 Herd of Models, arXiv 2407.21783, table 3."""

    layers: int
    width: int
    hidden: int
    keys: int = 1024
    vocabulary: int = 128_256

    def shapes(self, stages: int) -> list[tuple[str, tuple[int, ...]]]:
        """Kind (how tensor parallelism splits it) and shape of each parameter in the first of ``stages``."""
        block = [
            ("columns", (self.width, self.width)), ("columns", (self.keys, self.width)),
            ("columns", (self.keys, self.width)), ("rows", (self.width, self.width)),
            ("columns", (self.hidden, self.width)), ("columns", (self.hidden, self.width)),
            ("rows", (self.width, self.hidden)), ("norm", (self.width,)), ("norm", (self.width,)),
        ]  # fmt: skip
        ends = [("columns", (self.vocabulary, self.width))] * (2 if stages == 1 else 1)
        return ends[:1] + block * math.ceil(self.layers / stages) + ends[1:]


MODELS = {"8B": Llama(32, 4096, 14336), "70B": Llama(80, 8192, 28672), "405B": Llama(126, 16384, 53248)}


@dataclass(frozen=True)
class Layout:
    """Placement of a model over the ranks."""

    shard: int | None = None
    """Ranks that FSDP2 shards over, with replicas over the rest (HSDP); ``None``: all remaining ranks."""
    tensor: int = 1
    """Ranks of tensor parallelism."""
    stages: int = 1
    """Pipeline stages."""

    def fits(self, world_size: int) -> bool:
        """Whether the layout divides ``world_size`` ranks."""
        return world_size % ((self.shard or 1) * self.tensor * self.stages) == 0

    def mesh(self, world_size: int) -> DeviceMesh:
        """The first stage's mesh: (replicate, shard, tensor)."""
        remaining = world_size // (self.tensor * self.stages)
        shard = self.shard or remaining
        sizes = (self.stages, remaining // shard, shard, self.tensor)
        whole = init_device_mesh("cpu", sizes, mesh_dim_names=("stage", "replicate", "shard", "tensor"))
        return whole["replicate", "shard", "tensor"]


LAYOUTS = {
    "FSDP2": Layout(),
    "HSDP, shards of 64": Layout(shard=64),
    "FSDP2 + TP 8": Layout(tensor=8),
    "FSDP2 + TP 8 + PP 16": Layout(tensor=8, stages=16),
}


class Scratch(TorchDispatchMode):
    """Tracks the bytes of live storages that were allocated while the mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # the mode is called again for the local tensors
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            storage = leaf.untyped_storage() if isinstance(leaf, Tensor) else None
            if storage is not None and id(storage) not in given | self._known:
                self._known.add(id(storage))
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._release, id(storage), storage.nbytes())
        return result

    def _release(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.held -= size


@dataclass
class Cost:
    """Cost of one rank's step."""

    parameters: int
    """Number of parameter elements on the rank."""
    base_bytes: int
    """Bytes of the base optimizer's state."""
    own_bytes: int
    """Bytes of references, Delta and the tuner."""
    scratch: int
    """Peak bytes that a step allocates, without the base optimizer's step."""
    collectives: int
    host_seconds: float
    """Median host time of a step, including operator dispatch."""
    base_seconds: float
    """Median host time of the base optimizer's step alone."""


def make_parameters(model: Llama, stages: int, mesh: DeviceMesh) -> list[Tensor]:
    """Rank 0's parameters with gradients, in float32."""
    splits = {"columns": Shard(0), "rows": Shard(1), "norm": Replicate()}
    parameters: list[Tensor] = []
    for kind, shape in model.shapes(stages):
        placements: list[Placement] = [Replicate(), Shard(0), splits[kind]]
        held = list(shape)
        for size, placement in zip(mesh.shape, placements):
            if isinstance(placement, Shard):
                held[placement.dim] = math.ceil(held[placement.dim] / size)
        local = torch.empty(held, device="meta")
        stride = torch.empty(shape, device="meta").stride()
        parameter = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        ).requires_grad_()
        parameter.grad = torch.empty_like(parameter)
        parameters.append(parameter)
    return parameters


def local_bytes(values: Any) -> int:
    """Bytes of the local parts of the tensors among ``values``."""
    locals_ = (value.to_local() if isinstance(value, DTensor) else value for value in values)
    return sum(value.numel() * value.element_size() for value in locals_ if isinstance(value, Tensor))


def host_seconds(optimizer: Optimizer, repeats: int) -> float:
    """Median duration of a step in seconds, after two untimed ones."""
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def measure(model: Llama, layout: Layout, world_size: int, repeats: int) -> Cost:
    """Measure steps on rank 0 of ``world_size``."""
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        mesh = layout.mesh(world_size)

        def base() -> AdamW:
            return AdamW(make_parameters(model, layout.stages, mesh), lr=1.0, weight_decay=0.1, foreach=True)

        base_seconds = host_seconds(base(), repeats)
        inner = base()
        optimizer = Mechanic(inner, variant="optax", pipeline_stages=layout.stages, nonfinite="ignore")
        seconds = host_seconds(optimizer, repeats)
        with CallCounter() as calls:
            optimizer.step()
        with Scratch() as scratch, mock.patch.object(inner, "step"):  # of the wrapper alone
            optimizer.step()
        parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
        entries = [(key, value) for state in inner.state.values() for key, value in state.items()]
        own = [value for key, value in entries if key in Mechanic.STATE_KEYS]
        return Cost(
            parameters=local_bytes(parameters) // 4,
            base_bytes=local_bytes(value for key, value in entries if key not in Mechanic.STATE_KEYS),
            own_bytes=local_bytes(own) + local_bytes([inner.param_groups[0][Mechanic.GROUP_KEY]]),
            scratch=scratch.peak,
            collectives=calls.counts["collectives"],
            host_seconds=seconds,
            base_seconds=base_seconds,
        )
    finally:
        dist.destroy_process_group()


def hops(world_size: int, node: int) -> int:
    """Sequential messages of a small all_reduce over a tree of nodes of ``node`` ranks.

    Its latency is that of the longest path: up the tree and down again, as in NCCL's double binary trees. A ring needs
    2 * (world_size - 1) messages.
    """
    return 2 * math.ceil(math.log2(max(world_size / node, 1))) + (2 if world_size > 1 else 0)


def table(models: Sequence[str], world_sizes: Sequence[int], repeats: int, node: int, hop: float) -> str:
    """A Markdown table of the costs by model, layout and number of ranks."""
    heads = [
        "model", "layout", "ranks", "parameters a rank", "AdamW's state", "manic's state", "scratch",
        "all_reduces", "host, AdamW", "host, Mechanic(AdamW)", "hops", f"all_reduce at {1e6 * hop:g} us a hop",
    ]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for name in models:
        for layout_name, layout in LAYOUTS.items():
            for world_size in world_sizes:
                if not layout.fits(world_size):
                    continue
                cost = measure(MODELS[name], layout, world_size, repeats)
                count = hops(world_size, node)
                lines.append("| " + " | ".join([
                    name, layout_name, f"{world_size:,}", f"{cost.parameters:,}", _mebibytes(cost.base_bytes),
                    _mebibytes(cost.own_bytes), _mebibytes(cost.scratch), str(cost.collectives),
                    f"{1e3 * cost.base_seconds:.0f} ms", f"{1e3 * cost.host_seconds:.0f} ms", str(count),
                    f"{1e6 * count * hop:.0f} us",
                ]) + " |")  # fmt: skip
    return "\n".join(lines)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
