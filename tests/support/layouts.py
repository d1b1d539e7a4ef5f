"""One small model, placed on the ranks in every supported layout and trained for a few steps."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manic import Mechanic, mechanize

BATCH = 24


class Net(nn.Module):
    """Rows of 16, 7 and 3: over two to four ranks, shards are even, uneven and empty. One layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 16)
        self.down = nn.Linear(16, 7)
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 3)
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.head(self.norm(self.down(torch.tanh(self.up(x))))))


def make_net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
    y = torch.stack((x[:, 0] * x[:, 1], x[:, 2].sin(), x.sum(dim=1)), dim=1)
    return x.to(dtype), y.to(dtype)


def members(model: nn.Module, base: str, owned: Any = None) -> Any:
    """The parameters for a base; for one named "... by group" those of the first layer apart from all others."""
    owned = list(model.parameters()) if owned is None else owned
    if not base.endswith(" by group"):
        return owned
    known = {id(parameter) for parameter in owned}
    named = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in known]
    return [{"params": [p for name, p in named if ("up." in name) == is_first]} for is_first in (True, False)]


def make_base(name: str, parameters: Any) -> torch.optim.Optimizer:
    name = name.removesuffix(" by group")
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.1)
    if name == "adamw-fused":
        return torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.1, fused=True)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=1.0, momentum=0.9, nesterov=True, weight_decay=0.01)
    if name == "asgd":  # reads its parameters, so the step takes a snapshot
        return torch.optim.ASGD(parameters, lr=1.0, lambd=0.01)
    raise AssertionError(name)


class CollectiveLog(TorchDispatchMode):
    """Records collectives, including functional ones, while the mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
            self.calls.append((func.__name__.split(".")[0], sum(t.numel() * t.element_size() for t in tensors)))
        return func(*args, **(kwargs or {}))


@dataclass
class Trained:
    scale: Any
    """A number, or a list of one for each param group."""
    metrics: dict[str, float]
    parameters: dict[str, Tensor]
    collectives: list[list[tuple[str, int]]] = field(default_factory=list)
    """For each optimizer step, the collectives and their bytes."""


@dataclass
class Setup:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    mechanic: Mechanic
    data_rank: int
    data_size: int
    gather: Callable[[], dict[str, Tensor]]


def full(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


def setup(layout: str, base: str, dtype: torch.dtype, **options: Any) -> Setup:
    """Place the model on all ranks in ``layout``, and wrap its base optimizer."""
    net = make_net(dtype)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    options = {"variant": "optax", **options}
    if layout == "pipeline":  # two stages, each replicated over half of the ranks
        return _setup_pipeline(base, net, rank, world, options)
    model, data = PLACEMENTS[layout](net, rank, world)
    gather = functools.partial(_gather, model)
    if layout == "zero1":
        cls = mechanize(lambda params, **_: make_base(base, params), plain="sharded", **options)
        zero = ZeroRedundancyOptimizer(members(model, base), optimizer_class=cls)
        return Setup(model, zero, zero.optim, *data, gather)
    optimizer = Mechanic(make_base(base, members(model, base)), **options)
    return Setup(model, optimizer, optimizer, *data, gather)


def _gather(model: nn.Module) -> dict[str, Tensor]:
    is_fsdp1 = isinstance(model, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(model) if is_fsdp1 else contextlib.nullcontext():
        named = [(name.replace("_fsdp_wrapped_module.", ""), p) for name, p in model.named_parameters()]
        return {name.removeprefix("module."): full(p) for name, p in named}


Placed = tuple[nn.Module, tuple[int, int]]
"""The model in its layout; this rank's part of the data, and the number of parts."""


def _single(net: Net, rank: int, world: int) -> Placed:
    return net, (rank, world)


def _ddp(net: Net, rank: int, world: int) -> Placed:
    return DistributedDataParallel(net), (rank, world)


def _fsdp2(net: Net, rank: int, world: int) -> Placed:
    for child in (net.up, net.down, net.norm):
        fully_shard(child)
    fully_shard(net)
    return net, (rank, world)


def _hsdp(net: Net, rank: int, world: int) -> Placed:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(net.up, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net, (rank, world)


def _tensor_parallel(net: Net, rank: int, world: int) -> Placed:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    parallelize_module(net, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return net, (0, 1)


def _tensor_parallel_and_fsdp2(net: Net, rank: int, world: int) -> Placed:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(net, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(net.up, mesh=mesh["dp"])
    fully_shard(net, mesh=mesh["dp"])
    return net, (mesh["dp"].get_local_rank(), 2)


def _mixed(net: Net, rank: int, world: int) -> Placed:
    """One layer sharded over all ranks, one over half of them, the rest plain."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("outer", "inner"))
    fully_shard(net.up)
    fully_shard(net.down, mesh=mesh["inner"])
    for child in (net.norm, net.head):
        for parameter in child.parameters():
            parameter.register_post_accumulate_grad_hook(_average_gradient)
    for parameter in net.down.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: _average_local_gradient(p, mesh["outer"].get_group()))
    return net, (rank, world)


def _fsdp1(net: Net, rank: int, world: int, *, use_orig_params: bool = True, is_hybrid: bool = False) -> Placed:
    options: dict[str, Any] = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
    options["sharding_strategy"] = ShardingStrategy.FULL_SHARD
    if is_hybrid:
        options["sharding_strategy"] = ShardingStrategy.HYBRID_SHARD
        options["device_mesh"] = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    for name in ("up", "down"):
        setattr(net, name, FullyShardedDataParallel(getattr(net, name), **options))
    return FullyShardedDataParallel(net, ignored_modules=[net.frozen], **options), (rank, world)


PLACEMENTS: dict[str, Callable[[Net, int, int], Placed]] = {
    "single": _single,
    "ddp": _ddp,
    "zero1": _ddp,
    "fsdp2": _fsdp2,
    "hsdp": _hsdp,
    "tp": _tensor_parallel,
    "tp+fsdp2": _tensor_parallel_and_fsdp2,
    "mixed": _mixed,
    "fsdp1-orig": _fsdp1,
    "fsdp1-flat": functools.partial(_fsdp1, use_orig_params=False),
    "fsdp1-hybrid": functools.partial(_fsdp1, is_hybrid=True),
}
"""How each layout but the pipeline places the model: from the model, the rank and the number of ranks."""


def _average_gradient(parameter: Tensor) -> None:
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def _average_local_gradient(parameter: Tensor, group: dist.ProcessGroup) -> None:
    assert isinstance(parameter.grad, DTensor)
    local = parameter.grad.to_local()
    if local.numel():
        dist.all_reduce(local, group=group)
        local /= dist.get_world_size(group)
    else:
        dist.all_reduce(local, group=group)


def _setup_pipeline(base: str, model: Net, rank: int, world: int, options: dict[str, Any]) -> Setup:
    """A pipeline without a schedule: every rank computes all gradients, and its optimizer owns those of its stage."""
    per_stage = world // 2
    stage = rank // per_stage
    stages: list[list[nn.Module]] = [[model.up], [model.down, model.norm, model.head, model.frozen]]
    owned = [p for child in stages[stage] for p in child.parameters()]
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = Mechanic(make_base(base, members(model, base, owned)), pipeline_stages=2, **options)

    def send_to_other_stages(*_: Any) -> None:
        with torch.no_grad():
            for index, children in enumerate(stages):
                for child in children:
                    for parameter in child.parameters():
                        dist.broadcast(parameter, src=index * per_stage)

    optimizer.register_step_post_hook(send_to_other_stages)

    def gather() -> dict[str, Tensor]:
        return {names[id(p)]: full(p) for p in model.parameters()}

    return Setup(model, optimizer, optimizer, 0, 1, gather)


def train(
    layout: str, base: str, steps: int, dtype: torch.dtype = torch.float64, options: dict[str, Any] | None = None
) -> Trained:
    """Train for ``steps`` steps and gather the whole model on every rank."""
    setup_ = setup(layout, base, dtype, **(options or {}))
    model, optimizer = setup_.model, setup_.optimizer
    collectives = []
    for step in range(steps):
        x, y = batch(step, dtype)
        share = BATCH // setup_.data_size
        part = slice(setup_.data_rank * share, (setup_.data_rank + 1) * share)
        optimizer.zero_grad()
        (model(x[part]) - y[part]).square().mean().backward()
        with CollectiveLog() as log:
            optimizer.step()
        collectives.append(log.calls)
    metrics = {name: value.item() for name, value in setup_.mechanic.metrics().items()}
    return Trained(setup_.mechanic.scale.tolist(), metrics, setup_.gather(), collectives)
