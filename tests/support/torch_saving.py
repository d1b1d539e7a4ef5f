"""Torch's own ways to save and load a run, by name, and the run that they are compared on."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
)
from torch.optim import AdamW, Optimizer
from torch.utils._pytree import tree_map_only

from manic import Mechanic
from support.layouts import BATCH, batch, setup

Result = tuple[Any, list[Tensor]]
Wrap = Callable[[nn.Module], nn.Module]


def plain(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


class Run:
    def __init__(
        self, layout: str, make: Callable[[nn.Module], Optimizer] | None = None, wrap: Wrap | None = None
    ) -> None:
        spread = setup(layout, "adamw", torch.float64, s_init=1e-3)
        self.model = spread.model if wrap is None else wrap(spread.model)
        self.optimizer: Any = spread.optimizer if make is None else make(spread.model)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=20)
        # A wrapped model gets the whole batch on every rank, and its gradients need no averaging.
        self.data_rank, self.data_size = (0, 1) if wrap else (spread.data_rank, spread.data_size)
        self.gather = spread.gather

    def train(self, steps: int) -> None:
        for _ in range(steps):
            x, y = batch(self.scheduler.last_epoch, torch.float64)
            share = BATCH // self.data_size
            part = slice(self.data_rank * share, (self.data_rank + 1) * share)
            self.optimizer.zero_grad()
            (self.model(x[part]) - y[part]).square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()

    def result(self) -> Result:
        """S or each group's, or ``None`` for a plain optimizer, and every parameter."""
        optimizer = getattr(self.optimizer, "optim", self.optimizer)  # inside ZeRO
        scale = optimizer.scale.tolist() if isinstance(optimizer, Mechanic) else None
        return scale, list(self.gather().values())

    def save(self, mechanism: str, directory: str) -> Any:
        Path(directory).mkdir(exist_ok=True)
        saved = MECHANISMS[mechanism].save(self, Path(directory))
        return saved, copy.deepcopy(self.scheduler.state_dict())

    def load(self, mechanism: str, saved: Any) -> None:
        MECHANISMS[mechanism].load(self, saved[0])
        self.scheduler.load_state_dict(copy.deepcopy(saved[1]))


def assert_identical(first: Result, second: Result) -> None:
    assert first[0] == second[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def kept(state: Any) -> Any:
    """A copy of a state dict, whose tensors would otherwise change with the run."""
    return tree_map_only(Tensor, copy.deepcopy, state)


class Mechanism(NamedTuple):
    """Functions that save model and optimizer, and load what the first one returned."""

    save: Callable[[Run, Path], Any]
    load: Callable[[Run, Any], None]


def separately(options: StateDictOptions, loading: StateDictOptions | None = None) -> Mechanism:
    def save(run: Run, _: Path) -> Any:
        model = get_model_state_dict(run.model, options=options)
        return kept((model, get_optimizer_state_dict(run.model, run.optimizer, options=options)))

    def load(run: Run, saved: Any) -> None:
        model, optimizer = kept(saved)
        set_model_state_dict(run.model, model, options=loading or options)
        set_optimizer_state_dict(run.model, run.optimizer, optimizer, options=loading or options)

    return Mechanism(save, load)


def at_once() -> Mechanism:
    def save(run: Run, _: Path) -> Any:
        return kept(get_state_dict(run.model, run.optimizer))

    def load(run: Run, saved: Any) -> None:
        model, optimizer = kept(saved)
        set_state_dict(run.model, run.optimizer, model_state_dict=model, optim_state_dict=optimizer)

    return Mechanism(save, load)


class AppState(Stateful):
    """As in torch's tutorial."""

    def __init__(self, run: Run, options: StateDictOptions | None = None) -> None:
        self.run, self.options = run, options

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.run.model, self.run.optimizer, options=self.options)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.run.model, self.run.optimizer,
            model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=self.options,
        )  # fmt: skip


def in_files(options: StateDictOptions | None = None, planner: Callable[[], Any] = dcp.DefaultLoadPlanner) -> Mechanism:
    def save(run: Run, directory: Path) -> Path:
        path = directory / f"{run.scheduler.last_epoch}"
        dcp.save({"app": AppState(run, options)}, checkpoint_id=path)
        return path

    def load(run: Run, path: Path) -> None:
        dcp.load({"app": AppState(run, options)}, checkpoint_id=path, planner=planner())

    return Mechanism(save, load)


def start_saving(run: Run, directory: Path) -> tuple[Any, Path]:
    # A separate group: training runs its collectives at the same time.
    group = dist.new_group(backend="cpu:gloo")
    path = directory / f"{run.scheduler.last_epoch}, staged"
    return dcp.async_save({"app": AppState(run)}, checkpoint_id=path, process_group=group), path


def finish_and_load(run: Run, saved: tuple[Any, Path]) -> None:
    saved[0].result()
    dcp.load({"app": AppState(run)}, checkpoint_id=saved[1])


def of_fsdp1(kind: StateDictType, *configs: Any) -> Mechanism:
    def save(run: Run, _: Path) -> Any:
        with FullyShardedDataParallel.state_dict_type(run.model, kind, *configs):
            optimizer = FullyShardedDataParallel.optim_state_dict(run.model, run.optimizer)
            return kept((run.model.state_dict(), optimizer))

    def load(run: Run, saved: Any) -> None:
        model, optimizer = kept(saved)
        with FullyShardedDataParallel.state_dict_type(run.model, kind, *configs):
            run.model.load_state_dict(model)
            optimizer = FullyShardedDataParallel.optim_state_dict_to_load(run.model, run.optimizer, optimizer)
            run.optimizer.load_state_dict(optimizer)

    return Mechanism(save, load)


def consolidate(run: Run, _: Path) -> Any:
    run.optimizer.consolidate_state_dict(to=0)
    box = [run.optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return copy.deepcopy((run.model.state_dict(), box[0]))


def load_all(run: Run, saved: Any) -> None:
    model, optimizer = copy.deepcopy(saved)
    run.model.load_state_dict(model)
    run.optimizer.load_state_dict(optimizer)


def write_own_file(run: Run, directory: Path) -> Path:
    path = directory / f"rank {dist.get_rank()}.pt"
    torch.save((run.model.state_dict(), run.optimizer.state_dict()), path)
    return path


def read_own_file(run: Run, path: Path) -> None:
    load_all(run, torch.load(path, weights_only=True))


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
MECHANISMS = {
    "nested": separately(StateDictOptions()),
    "flat": separately(FLAT),
    "full": separately(StateDictOptions(full_state_dict=True)),
    "gathered on one rank": separately(
        StateDictOptions(full_state_dict=True, cpu_offload=True),
        loading=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    ),
    "offloaded": separately(StateDictOptions(cpu_offload=True)),
    "at once": at_once(),
    "files": in_files(),
    "staged": Mechanism(start_saving, finish_and_load),
    "fsdp1 full": of_fsdp1(
        # With offload_to_cpu, FSDP1 on a CPU gives exp_avg the values of exp_avg_sq, with plain AdamW too.
        StateDictType.FULL_STATE_DICT, FullStateDictConfig(), FullOptimStateDictConfig(offload_to_cpu=False),
    ),
    "fsdp1 sharded": of_fsdp1(
        StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(), ShardedOptimStateDictConfig()
    ),
    "consolidated": Mechanism(consolidate, load_all),
    "own file": Mechanism(write_own_file, read_own_file),
    "flat files": in_files(FLAT),
    "flat files, in part": in_files(FLAT, functools.partial(dcp.DefaultLoadPlanner, allow_partial_load=True)),
    "files, in part": in_files(None, functools.partial(dcp.DefaultLoadPlanner, allow_partial_load=True)),
}  # fmt: skip
