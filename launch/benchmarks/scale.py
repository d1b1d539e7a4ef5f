"""What a step asks of one rank of many, found without hardware: a process group that only pretends, tensors of no data.

A step runs as it would on rank 0 of a Llama-3-shaped model: what it allocates, calls and communicates is counted, and
the host's time measured, but no number is computed. Speeds of devices and networks are not in it.
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

from benchmarks.step import Calls
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
        """Kind (how tensor parallelism splits it) and shape of the parameters of the first of ``stages``."""
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
class Spread:
    """How a model is laid out over the ranks."""

    shard: int | None = None
    """Ranks that FSDP2 shards over, the model being replicated over the rest (HSDP); None: all that are left."""
    tensor: int = 1
    """Ranks of tensor parallelism."""
    stages: int = 1
    """Of a pipeline."""

    def fits(self, world_size: int) -> bool:
        """Whether so many ranks can be laid out like this."""
        return world_size % ((self.shard or 1) * self.tensor * self.stages) == 0

    def mesh(self, world_size: int) -> DeviceMesh:
        """Of the first stage: (replicate, shard, tensor)."""
        left = world_size // (self.tensor * self.stages)
        shard = self.shard or left
        sizes = (self.stages, left // shard, shard, self.tensor)
        whole = init_device_mesh("cpu", sizes, mesh_dim_names=("stage", "replicate", "shard", "tensor"))
        return whole["replicate", "shard", "tensor"]


SPREADS = {
    "FSDP2": Spread(),
    "HSDP, shards of 64": Spread(shard=64),
    "FSDP2 + TP 8": Spread(tensor=8),
    "FSDP2 + TP 8 + PP 16": Spread(tensor=8, stages=16),
}


class Scratch(TorchDispatchMode):
    """Follows the bytes of storages that were made inside and still live."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # to be asked again about the local tensors
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            storage = leaf.untyped_storage() if isinstance(leaf, Tensor) else None
            if storage is not None and id(storage) not in given | self._known:
                self._known.add(id(storage))
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        return result

    def _gone(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.held -= size


@dataclass
class Cost:
    """Of one rank's step."""

    parameters: int
    """Elements of parameters on the rank."""
    base_bytes: int
    """Of the base optimizer's state."""
    own_bytes: int
    """Of x_ref, Delta and the tuner."""
    scratch: int
    """The most bytes that a step holds at a time over what it had, but for the base optimizer's own."""
    collectives: int
    host_seconds: float
    """For the Python of a step, operators' dispatch included: the median."""
    base_seconds: float
    """The same of the base optimizer alone."""


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
    """Of the tensors among ``values`` on this rank."""
    locals_ = (value.to_local() if isinstance(value, DTensor) else value for value in values)
    return sum(value.numel() * value.element_size() for value in locals_ if isinstance(value, Tensor))


def host_seconds(optimizer: Optimizer, repeats: int) -> float:
    """The median of a step, after two."""
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def measure(model: Llama, spread: Spread, world_size: int, repeats: int) -> Cost:
    """Take steps on rank 0 of ``world_size``."""
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        mesh = spread.mesh(world_size)

        def base() -> AdamW:
            return AdamW(make_parameters(model, spread.stages, mesh), lr=1.0, weight_decay=0.1, foreach=True)

        base_seconds = host_seconds(base(), repeats)
        inner = base()
        optimizer = Mechanic(inner, variant="optax", pipeline_stages=spread.stages, nonfinite="ignore")
        seconds = host_seconds(optimizer, repeats)
        with Calls() as calls:
            optimizer.step()
        with Scratch() as scratch, mock.patch.object(inner, "step"):  # the wrapper's own
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
    """Messages that wait for each other when a tree of nodes of ``node`` ranks sums a few numbers and hands them out.

    Such an all_reduce is as long as its longest way: up the tree and down again, as NCCL's double binary trees go. A
    ring's way would be 2 * (world_size - 1).
    """
    return 2 * math.ceil(math.log2(max(world_size / node, 1))) + (2 if world_size > 1 else 0)


def table(models: Sequence[str], world_sizes: Sequence[int], repeats: int, node: int, hop: float) -> str:
    """As Markdown."""
    heads = [
        "model", "layout", "ranks", "parameters a rank", "AdamW's state", "manic's state", "scratch",
        "all_reduces", "host, AdamW", "host, Mechanic(AdamW)", "hops", f"all_reduce at {1e6 * hop:g} us a hop",
    ]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for name in models:
        for layout, spread in SPREADS.items():
            for world_size in world_sizes:
                if not spread.fits(world_size):
                    continue
                cost = measure(MODELS[name], spread, world_size, repeats)
                way = hops(world_size, node)
                lines.append("| " + " | ".join([
                    name, layout, f"{world_size:,}", f"{cost.parameters:,}", _mebibytes(cost.base_bytes),
                    _mebibytes(cost.own_bytes), _mebibytes(cost.scratch), str(cost.collectives),
                    f"{1e3 * cost.base_seconds:.0f} ms", f"{1e3 * cost.host_seconds:.0f} ms", str(way),
                    f"{1e6 * way * hop:.0f} us",
                ]) + " |")  # fmt: skip
    return "\n".join(lines)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
