"""Trials in which one rank is lost: the errors and the state of the survivors.

Independent of manic.testing, which ends all ranks soon after one fails. Survivors stay alive after their error until
all have reported, so that the end of one survivor does not affect another.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from gpt.parallel import make_mesh
from support import layouts
from support.layouts import BATCH, Setup, batch, setup

TIMEOUT = 5.0
"""Timeout of the process group, in seconds."""
MARGIN = 10.0
"""Tolerated delay of an error on a busy machine, in seconds."""
LIFE = 120
"""Seconds after which all processes of a trial have ended."""
STEPS = 6


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _exit() -> None:
    os._exit(7)


def _raise() -> None:
    raise ArithmeticError("lost on purpose")


@dataclass(frozen=True)
class Fault:
    """The fault of the lost rank."""

    step: int
    where: str
    """Before its backward, step, or base step, or before it joins the step's all_reduce."""
    act: Callable[[], None]


FAULTS = {
    "killed before its first step": Fault(0, "step", _kill),
    "killed before its backward": Fault(3, "backward", _kill),
    "killed while others are in the all_reduce": Fault(3, "reduce", _kill),
    "killed after it joined the all_reduce": Fault(3, "base step", _kill),
    "stopped before its backward": Fault(3, "backward", _stop),
    "stopped while others are in the all_reduce": Fault(3, "reduce", _stop),
    "exits before its step": Fault(3, "step", _exit),
    "raises before its step": Fault(3, "step", _raise),
}


@dataclass
class Survivor:
    """Error and state of a rank after another one was lost."""

    rank: int
    phase: str
    """Its phase: forward, backward or step; empty without an error."""
    began: float
    """Start of that phase, by the clock that all processes of a machine share."""
    ended: float
    """Time of the error."""
    error: str
    in_the_all_reduce: bool
    """Whether the wait for the step's all_reduce raised the error."""
    moved: bool
    """Whether the parameters had a displacement."""
    off: float
    """Largest difference of its parameters from x_t, relative to the largest element of x_t."""
    wrong: list[str] = field(default_factory=list)
    """Other differences from the state before the failed step."""


@dataclass
class Trial:
    lost_at: float
    survivors: list[Survivor]
    missing: list[int]
    """Ranks that did not report: they hang or have died."""

    def seconds(self, survivor: Survivor) -> float:
        """Seconds to the error from the loss, or from the start of the survivor's phase if that was later."""
        return survivor.ended - max(self.lost_at, survivor.began)


def local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


class Watch:
    """Records the state that a failed step must not change."""

    def __init__(self, setup_: Setup) -> None:
        self.mechanic = setup_.mechanic
        self.parameters = [p for group in self.mechanic.param_groups for p in group["params"]]
        # Taken between steps: in a forward pass, FSDP1's parameters are not views of the shards.
        self.shards = [local(p) for p in self.parameters]
        self.start = self._copies()
        self.settings = self._settings()
        # ZeRO broadcasts parameters after Mechanic's step, which is complete then.
        self.mechanic.register_step_post_hook(lambda *_: self.record())
        self.record()

    def _copies(self) -> list[Tensor]:
        return [shard.clone() for shard in self.shards]

    def record(self) -> None:
        self.x = self._copies()
        self.tuner = self._tuner().clone()

    def record_gradients(self) -> None:
        self.gradients = [p.grad for p in self.parameters]
        self.gradient_values = [None if g is None else local(g).clone() for g in self.gradients]

    def _tuner(self) -> Tensor:
        tuner: Tensor = self.mechanic.param_groups[0][self.mechanic.GROUP_KEY]
        return tuner

    def _settings(self) -> list[dict[str, Any]]:
        own = ("params", self.mechanic.GROUP_KEY)
        return [{key: value for key, value in group.items() if key not in own} for group in self.mechanic.param_groups]

    def moved(self) -> bool:
        return any(not torch.equal(a, b) for a, b in zip(self.shards, self.start)) or not any(
            shard.numel() for shard in self.shards
        )

    def off(self) -> float:
        worst = 0.0
        for shard, x in zip(self.shards, self.x):
            if not torch.equal(shard, x):
                worst = max(worst, ((shard - x).abs().max() / x.abs().max()).nan_to_num(nan=torch.inf).item())
        return worst

    def wrong(self, in_step: bool) -> list[str]:
        found = []
        if not torch.equal(self._tuner(), self.tuner):
            found.append("the tuner has changed")
        if not torch.is_grad_enabled():
            found.append("gradients are off")
        if self._settings() != self.settings:
            found.append(f"settings {self._settings()}, were {self.settings}")
        held = [p for group in self.mechanic.param_groups for p in group["params"]]
        if [id(p) for p in held] != [id(p) for p in self.parameters]:
            found.append("the param groups hold other tensors")
        if not {id(key) for key in self.mechanic.state} <= {id(p) for p in self.parameters}:
            found.append("the state has keys that are not parameters")
        if in_step:
            if any(p.grad is not gradient for p, gradient in zip(self.parameters, self.gradients)):
                found.append("gradients were replaced")
            for index, (gradient, value) in enumerate(zip(self.gradients, self.gradient_values)):
                if gradient is not None and not torch.equal(local(gradient), value):  # type: ignore[arg-type]
                    found.append(f"gradient {index} was changed")
        return found


def trial(
    fault: str, world_size: int, lost: int, layout: str, base: str, dtype: torch.dtype, options: dict[str, Any]
) -> Trial:
    """Train on ``world_size`` ranks until rank ``lost`` is lost, and collect the others' reports."""
    # A server with torch imported forks the ranks, which is fast; it has started no threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.optim", "manic"]
    )
    began = time.monotonic()
    processes: list[Any] = []
    connections: list[Connection] = []
    reports: dict[int, Survivor] = {}
    try:
        for rank in range(world_size):
            here, there = context.Pipe()
            arguments = (there, fault, world_size, rank, lost, layout, base, dtype, options)
            process = context.Process(target=_live, args=arguments, daemon=True)
            process.start()
            there.close()
            processes.append(process)
            connections.append(here)
        # Start together: the start time on a busy machine must not count towards the process group's timeout.
        ports = [connection.recv() if connection.poll(LIFE) else 0 for connection in connections]
        for connection in connections:
            connection.send(ports[0])
        deadline = began + LIFE
        lost_at: float = connections[lost].recv() if connections[lost].poll(LIFE) else 0.0
        deadline = min(deadline, lost_at + TIMEOUT + 2 * MARGIN)
        pending = {connections[rank]: rank for rank in range(world_size) if rank != lost}
        while pending and time.monotonic() < deadline:
            for ready in wait(list(pending), timeout=max(0.0, deadline - time.monotonic())):
                rank = pending.pop(ready)  # type: ignore[call-overload]
                try:
                    survivor: Survivor = connections[rank].recv()
                except EOFError:
                    continue
                reports[rank] = survivor
    finally:
        for process in processes:
            process.kill()
        for process, connection in zip(processes, connections):
            process.join()
            connection.close()
    survivors = [reports[rank] for rank in sorted(reports)]
    return Trial(lost_at, survivors, [rank for rank in range(world_size) if rank != lost and rank not in reports])


def _live(
    connection: Connection,
    fault: str,
    world_size: int,
    rank: int,
    lost: int,
    layout: str,
    base: str,
    dtype: torch.dtype,
    options: dict[str, Any],
) -> None:
    signal.alarm(LIFE)  # ends a rank that is left behind
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT)
    # The first rank hosts the store, as in a job, on a free port.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    connection.send(store.port if store is not None else 0)
    port: int = connection.recv()
    store = store or dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    # The groups of torch's meshes have a timeout of 30 minutes.
    vars(layouts)["init_device_mesh"] = lambda kind, shape, mesh_dim_names: make_mesh(
        kind, shape, mesh_dim_names, timeout
    )
    setup_ = setup(layout, base, dtype, **{"s_init": 1e-2, **options})
    if rank == lost:

        def lose() -> None:
            connection.send(time.monotonic())
            FAULTS[fault].act()

        _train_until_lost(setup_, layout, FAULTS[fault], lose)
    else:
        connection.send(_train_until_error(setup_, layout, rank))
        signal.pause()


def _loss(setup_: Setup, layout: str, step: int) -> Tensor:
    x, y = batch(step, next(setup_.model.parameters()).dtype)
    size = 1 if layout == "single" else setup_.data_size
    share = BATCH // size
    part = slice((setup_.data_rank % size) * share, (setup_.data_rank % size + 1) * share)
    return (setup_.model(x[part]) - y[part]).square().mean()


def _train_until_lost(setup_: Setup, layout: str, fault: Fault, lose: Callable[[], None]) -> None:
    def lose_late() -> None:
        time.sleep(0.3)  # until the others wait
        lose()

    for step in range(STEPS):
        here = fault.where if step == fault.step else ""
        setup_.optimizer.zero_grad()
        loss = _loss(setup_, layout, step)
        if here == "backward":
            lose_late()
        loss.backward()
        if here == "step":
            lose_late()
        if here == "reduce":
            dist.all_reduce = lambda *_, **__: lose_late()
        if here == "base step":
            setup_.mechanic.optimizers[0].register_step_pre_hook(lambda *_: lose())
        setup_.optimizer.step()


def _train_until_error(setup_: Setup, layout: str, rank: int) -> Survivor:
    watch = Watch(setup_)
    phase, began = "", time.monotonic()
    try:
        for step in range(STEPS):
            watch.record()
            phase, began = "forward", time.monotonic()
            setup_.optimizer.zero_grad()
            loss = _loss(setup_, layout, step)
            phase, began = "backward", time.monotonic()
            loss.backward()
            watch.record_gradients()
            phase, began = "step", time.monotonic()
            setup_.optimizer.step()
        phase = ""
    except Exception as error:
        ended = time.monotonic()
        functions = []
        trace = error.__traceback__
        while trace is not None:
            functions.append(trace.tb_frame.f_code.co_qualname)
            trace = trace.tb_next
        return Survivor(
            rank, phase, began, ended, f"{type(error).__name__}: {error}", "PendingSums.wait" in functions,
            watch.moved(), watch.off(), watch.wrong(phase == "step"),
        )  # fmt: skip
    return Survivor(rank, "", began, time.monotonic(), "", False, watch.moved(), watch.off())
