"""Small runs of DeepSpeed's engine on gloo ranks, and the same runs in one process without DeepSpeed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from manic import Mechanic
from manic.integrations.deepspeed import whole_model_steps

STEPS = 16
PER_RANK = 30


@dataclass(frozen=True)
class Run:
    """What is trained, and how."""

    stage: int
    groups: int = 1
    """With 2, matrices and the rest."""
    variant: str = "multiplicative"
    dtype: torch.dtype = torch.float32
    sub_group_size: int = 10**9
    """Elements of this rank's partitions after which ZeRO-3 begins another sub-group."""
    offloads: bool = False
    compiles: bool = False
    """Whether DeepSpeedCPUAdam takes the place of torch's AdamW."""
    clipping: float = 0.0
    accumulates: int = 1
    """Micro batches of a step."""
    joins: bool = True
    """Whether whole_model_steps is called."""
    checks_overflow: bool = True
    """Whether ZeRO skips steps whose gradients are not finite, in bfloat16."""
    plain: str = "sharded"
    options: tuple[tuple[str, Any], ...] = ()
    """Mechanic's."""
    begins_partitioned: bool = False
    """Whether the model is built in zero.Init."""
    is_universal: bool = False
    """Whether checkpoints that are loaded are universal ones."""

    @property
    def config(self) -> dict[str, Any]:
        """DeepSpeed's."""
        zero: dict[str, Any] = {
            "stage": self.stage, "stage3_param_persistence_threshold": 0, "sub_group_size": self.sub_group_size,
            "reduce_bucket_size": 4096, "allgather_bucket_size": 4096,
        }  # fmt: skip
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": PER_RANK // self.accumulates, "zero_optimization": zero,
            "gradient_accumulation_steps": self.accumulates, "gradient_clipping": self.clipping,
            "zero_allow_untested_optimizer": True, "steps_per_print": None,
            "checkpoint": {"load_universal": self.is_universal},
        }  # fmt: skip
        if self.offloads:
            config["zero_force_ds_cpu_optimizer"] = False
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.dtype == torch.bfloat16:
            config["bf16"] = {"enabled": True, "check_grad_overflow": self.checks_overflow}
            if self.stage:
                config["data_types"] = {"grad_accum_dtype": "fp32"}
        if self.dtype == torch.float16:
            config["fp16"] = {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}
        return config


@dataclass
class Outcome:
    """Where a run has come to."""

    scales: list[float]
    """S after each step; with a scale per group, those of all groups."""
    weights: Tensor
    """All parameters of the model, one after the other, in float32."""
    norms: list[float]
    """The gradients' norm before clipping."""


@cache
def begin() -> None:
    """Start DeepSpeed on the ranks of this process's group, without compiled operators."""
    os.environ.update(
        DS_ACCELERATOR="cpu", DS_BUILD_OPS="0", RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()),
        WORLD_SIZE=str(dist.get_world_size()), MASTER_ADDR="127.0.0.1", MASTER_PORT="29500",
    )  # fmt: skip
    import deepspeed
    import deepspeed.ops

    # It compiles an all_reduce in shared memory otherwise, for minutes, and waits for a lock that a killed run leaves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")


def make(run: Run) -> nn.Module:
    """The model, whose matrices two and three ranks do not divide evenly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 31), nn.Tanh(), nn.Linear(31, 5)).to(run.dtype)


def groups_of(run: Run, parameters: Sequence[Tensor]) -> list[Any]:
    """Param groups."""
    if run.groups == 1:
        return list(parameters)
    shapes = [getattr(p, "ds_shape", p.shape) for p in parameters]
    decayed, others = (
        [p for p, shape in zip(parameters, shapes) if (len(shape) > 1) == is_in] for is_in in (True, False)
    )
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 0.5}]


@cache
def data(world: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of all steps."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * PER_RANK * world, 16, generator=generator)
    return x, torch.tanh(x @ torch.randn(16, 5, generator=generator))


def engine_of(run: Run) -> tuple[Any, Mechanic]:
    """DeepSpeed's engine on this rank, and the Mechanic in it."""
    begin()
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=run.config, enabled=run.begins_partitioned):
        model = make(run)
    make_base = deepspeed.ops.adam.DeepSpeedCPUAdam if run.compiles else torch.optim.AdamW
    base = make_base(groups_of(run, list(model.parameters())), lr=1.0, weight_decay=0.01)
    optimizer = Mechanic(base, variant=run.variant, plain=run.plain, **dict(run.options))  # type: ignore[arg-type]
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=run.config)
    if run.joins:
        whole_model_steps(engine)
    return engine, optimizer


def take_step(engine: Any, step: int, factor: float = 1.0) -> None:
    """One step of this rank's share of the data."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x, y = data(world)
    start = (step * world + rank) * PER_RANK
    micro = engine.train_micro_batch_size_per_gpu()
    dtype = next(engine.module.parameters()).dtype
    for first in range(start, start + PER_RANK, micro):
        part = slice(first, first + micro)
        out = engine(x[part].to(dtype)).float()
        engine.backward(factor * nn.functional.mse_loss(out, y[part]))
        engine.step()


def weights_of(engine: Any) -> Tensor:
    """All parameters of an engine's model, on every rank."""
    import deepspeed

    parameters = list(engine.module.parameters())
    is_partitioned = any(hasattr(p, "ds_id") for p in parameters)
    with deepspeed.zero.GatheredParameters(parameters, enabled=is_partitioned):
        return torch.cat([p.detach().float().flatten() for p in parameters]).clone()


def with_deepspeed(run: Run) -> Outcome:
    """Train on this rank and the others."""
    engine, optimizer = engine_of(run)
    scales, norms = [], []
    for step in range(STEPS):
        take_step(engine, step)
        scales += torch.atleast_1d(optimizer.scale).tolist()
        norms.append(float(engine.get_global_grad_norm() or 0.0))
    return Outcome(scales, weights_of(engine), norms)


def in_one_process(run: Run, first: int = 0) -> Outcome:
    """The same run on this rank alone, with float32 masters of the model's parameters. Every rank must call it.

    Args:
        run: The run.
        first: The step to begin with.
    """
    alike = ("groups", "variant", "dtype", "clipping", "options")
    return _in_one_process(Run(0, **{name: getattr(run, name) for name in alike}), dist.get_world_size(), first)


@cache
def _in_one_process(run: Run, world: int, first: int) -> Outcome:
    alone = [dist.new_group([each]) for each in range(world)][dist.get_rank()]
    model = make(run)
    parameters = list(model.parameters())
    masters = [nn.Parameter(p.detach().float().clone()) for p in parameters]
    base = torch.optim.AdamW(groups_of(run, masters), lr=1.0)
    optimizer = Mechanic(base, variant=run.variant, process_group=alone, **dict(run.options))
    x, y = data(world)
    scales, norms = [], []
    for step in range(first, STEPS):
        part = slice(step * world * PER_RANK, (step + 1) * world * PER_RANK)
        model.zero_grad()
        nn.functional.mse_loss(model(x[part].to(run.dtype)).float(), y[part]).backward()
        for master, p in zip(masters, parameters):
            assert p.grad is not None
            master.grad = p.grad.float()
        norms.append(float(nn.utils.clip_grad_norm_(masters, run.clipping or float("inf"))))
        optimizer.step()
        with torch.no_grad():
            for master, p in zip(masters, parameters):
                p.copy_(master)
        scales += torch.atleast_1d(optimizer.scale).tolist()
    return Outcome(scales, torch.cat([p.detach().float().flatten() for p in parameters]), norms)
