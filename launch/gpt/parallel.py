"""Parallel modes: the calls of PyTorch that place a model on the ranks in each mode."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from gpt.model import GPT, Block

# A hanging rank ends the others after this timeout instead of the default 30 minutes. The death of a rank ends them
# immediately, or when the first of them has ended.
TIMEOUT = timedelta(minutes=5)
MODES = ("fsdp2", "hsdp", "tp", "fsdp1", "ddp", "zero1", "none")


@dataclass
class Parallel:
    """A model placed on the ranks, and this rank's part of the batch."""

    model: nn.Module
    data_rank: int
    data_size: int
    autocast: contextlib.AbstractContextManager[Any]
    """Context of a forward pass; reusable."""

    def part(self, batch_size: int) -> slice:
        """This rank's sequences of the global batch."""
        share = batch_size // self.data_size
        return slice(self.data_rank * share, (self.data_rank + 1) * share)


def make_mesh(
    device_type: str, shape: tuple[int, ...], mesh_dim_names: tuple[str, ...], timeout: timedelta = TIMEOUT
) -> DeviceMesh:
    """As ``init_device_mesh``, with process groups that have ``timeout``.

    Those of ``init_device_mesh`` have torch's default timeout, not the default group's: 30 minutes, or 10 with NCCL
    alone.
    """
    ranks = torch.arange(dist.get_world_size()).view(shape)
    groups = [
        dist.new_subgroups_by_enumeration(ranks.movedim(dim, -1).reshape(-1, size).tolist(), timeout=timeout)[0]
        for dim, size in enumerate(shape)
    ]
    return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=mesh_dim_names)


def parallelize(model: GPT, mode: str, device: torch.device, dtype: str) -> Parallel:
    """Place ``model``, which is equal on all ranks, on the ranks.

    Args:
        model: The model on ``device``, in float32.
        mode: One of :data:`MODES`. ``"none"`` trains the same model on the same batch on every rank.
        device: This rank's device.
        dtype: ``"fp32"``, or ``"bf16"`` to compute in bfloat16; parameters are float32 in both.

    Returns:
        The placed model.

    Raises:
        ValueError: if the mode does not support the number of ranks.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    low = torch.bfloat16 if dtype == "bf16" else None
    autocast = torch.autocast(device.type, torch.bfloat16) if low else contextlib.nullcontext()
    ids = [device.index] if device.type == "cuda" else None

    if mode in ("fsdp2", "hsdp"):
        if mode == "fsdp2":  # a mesh of all ranks has the default group
            mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
        else:
            mesh = make_mesh(device.type, _hybrid_shape(world), ("replicate", "shard"))
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        return Parallel(model, rank, world, contextlib.nullcontext())
    if mode == "fsdp1":
        wrapped = FullyShardedDataParallel(
            model,
            sharding_strategy=ShardingStrategy.FULL_SHARD,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            mixed_precision=MixedPrecision(param_dtype=low, reduce_dtype=torch.float32) if low else None,
            device_id=device,
            use_orig_params=True,
        )
        return Parallel(wrapped, rank, world, contextlib.nullcontext())
    if mode == "tp":
        heads = model.blocks[0].attention.query.out_features // model.blocks[0].attention.head_size
        if heads % world:
            raise ValueError(f"--parallel tp splits the heads: --heads {heads} is not a multiple of {world} ranks")
        mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("tp",))
        plan: dict[str, ParallelStyle] = {f"attention.{name}": ColwiseParallel() for name in ("query", "key", "value")}
        plan |= {"attention.out": RowwiseParallel(), "mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}
        for block in model.blocks:
            parallelize_module(block, mesh, plan)
        return Parallel(model, 0, 1, autocast)
    if mode in ("ddp", "zero1"):
        return Parallel(DistributedDataParallel(model, device_ids=ids), rank, world, autocast)
    if mode == "none":
        return Parallel(model, 0, 1, autocast)
    raise ValueError(f"--parallel must be one of {MODES}, got {mode!r}")


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their norm over the whole model is at most ``max_norm``; return the original norm."""
    if isinstance(model, FullyShardedDataParallel):
        return model.clip_grad_norm_(max_norm)
    # One norm for each mesh: DTensors of different meshes cannot be combined, nor DTensors and plain tensors.
    by_mesh: dict[Any, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter.grad)
    norms = [torch.nn.utils.get_total_norm(gradients) for gradients in by_mesh.values()]
    norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradients in by_mesh.values():
        for gradient in gradients:
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(factor)
    return norm


@functools.cache
def _hybrid_shape(world: int) -> tuple[int, int]:
    """Mesh shape (replicate, shard): two replicas if the number of ranks is even, else one."""
    return (2, world // 2) if world % 2 == 0 else (1, world)
