"""Ranks on one CPU for pytest: run a function on n gloo processes as if it were an ordinary test.

    from manic.testing import ranks

    @ranks(2)
    def test_my_sharded_training():
        model = fully_shard(MyModel())   # torch.distributed is initialised, this is rank 0 or 1
        ...

The processes are kept warm between tests and have nothing in common with other pytest-xdist workers: no port is
fixed, every test gets a process group of its own. A failing rank fails the test with its traceback and output;
a hanging one is killed at the timeout and shows where it hung.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import importlib
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["RankError", "ranks", "run", "shutdown"]

DEFAULT_TIMEOUT = 120.0
# Where a decorated test keeps the function that its ranks call.
_ON_EACH_RANK = "__manic_on_each_rank__"
# After one rank has failed, how long the others may take to fail or finish as well.
_GRACE = 3.0
# Until a fresh process has imported torch, on a machine that is busy with others.
_START_TIMEOUT = 300.0


class RankError(AssertionError):
    """A function failed on one rank or more, or did not come back; the message has every rank's account."""


def ranks(world_size: int, *, timeout: float = DEFAULT_TIMEOUT) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Decorate a test to run on ``world_size`` gloo ranks.

    The test must be at the top level of its module; its arguments (from ``pytest.mark.parametrize``, or fixtures)
    must be picklable.

    Args:
        world_size: How many processes.
        timeout: Seconds until the test fails.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        @functools.wraps(function)
        def on_all_ranks(*args: Any, **kwargs: Any) -> None:
            run(on_all_ranks, world_size, *args, timeout=timeout, **kwargs)

        vars(on_all_ranks)[_ON_EACH_RANK] = function
        return on_all_ranks

    return decorate


def run(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = DEFAULT_TIMEOUT, **kwargs: Any
) -> list[Any]:
    """Call ``function(*args, **kwargs)`` on ``world_size`` gloo ranks.

    Args:
        function: Importable: at the top level of a module.
        world_size: How many processes.
        *args: Picklable.
        timeout: Seconds until all ranks are killed.
        **kwargs: Picklable.

    Returns:
        What it returned, by rank.

    Raises:
        RankError: if it raised, died or hung on any rank.
        ValueError: if ``function`` cannot be found by its name, or ``world_size`` is not positive.
    """
    if world_size < 1:
        raise ValueError(f"world_size must be positive, got {world_size}")
    if "<" in function.__qualname__:
        raise ValueError(
            f"{function.__qualname__} must be at the top level of a module, where another process finds it"
        )
    __tracebackhide__ = True
    with tempfile.TemporaryDirectory(prefix="manic-ranks-") as folder:
        call = _Call(_importable(function.__module__), function.__qualname__, args, kwargs, world_size, timeout, folder)
        return _pool.run(call)


def shutdown() -> None:
    """End the warm processes; they are started again when needed. Called at exit."""
    _pool.kill()


class _Skipped(str):
    """Why a rank skipped."""


def _importable(module: str) -> str:
    """The name by which another process imports ``module``: a script's own, where it is the main module."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    return Path(file).stem if module == "__main__" and file else module


class _Call:
    """What a rank is told to do."""

    def __init__(
        self, module: str, name: str, args: Any, kwargs: Any, world_size: int, timeout: float, folder: str
    ) -> None:
        self.module, self.name, self.args, self.kwargs = module, name, args, kwargs
        self.world_size, self.timeout, self.folder = world_size, timeout, folder
        self.path = list(sys.path)
        self.port = 0

    def output(self, rank: int) -> Path:
        return Path(self.folder, f"rank{rank}.txt")

    def execute(self, rank: int) -> Any:
        sys.path[:] = self.path
        target: Any = importlib.import_module(self.module)
        for part in self.name.split("."):
            target = getattr(target, part)
        target = getattr(target, _ON_EACH_RANK, target)
        timeout = timedelta(seconds=self.timeout)
        store = dist.PrefixStore(self.folder, _connect(self.port))  # the folder's name is this call's alone
        dist.init_process_group("gloo", store=store, rank=rank, world_size=self.world_size, timeout=timeout)
        try:
            dist.barrier()  # nobody may leave before all have connected
            return target(*self.args, **self.kwargs)
        finally:
            # Without a barrier: a rank that failed must not wait for others.
            dist.destroy_process_group()


@functools.cache
def _connect(port: int) -> dist.TCPStore:
    """A rank's connection to the store of the process that called it, made once."""
    return dist.TCPStore("127.0.0.1", port, is_master=False)


class _Pool:
    """Warm processes, as many as any call so far has needed; all replaced after one was lost or left in doubt."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []
        self._store: dist.TCPStore | None = None

    def _grow(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        fresh = range(len(self._workers), count)
        while len(self._workers) < count:
            here, there = context.Pipe()
            # The main module is not wanted in the ranks: it may be pytest itself, or a script without a guard.
            with _without_main():
                process = context.Process(target=_serve, args=(there, len(self._workers)), daemon=True)
                process.start()
            there.close()
            self._workers.append((process, here))
        for rank in fresh:  # importing torch takes seconds, which are no test's own
            if not self._workers[rank][1].poll(_START_TIMEOUT):
                self.kill()
                raise RankError(f"rank {rank} did not start within {_START_TIMEOUT:g} s")
            self._workers[rank][1].recv_bytes()

    def kill(self) -> None:
        for process, connection in self._workers:
            process.kill()
            connection.close()
        for process, _ in self._workers:
            process.join()
        self._workers.clear()

    def run(self, call: _Call) -> list[Any]:
        __tracebackhide__ = True
        if any(not process.is_alive() for process, _ in self._workers):
            self.kill()
        self._grow(call.world_size)
        workers = self._workers[: call.world_size]
        if self._store is None:  # on a port that is free, in this process, which outlives every rank
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        call.port = self._store.port
        message = pickle.dumps(call)
        for _, connection in workers:
            connection.send_bytes(message)

        results: dict[int, tuple[bool, Any]] = {}
        failed = False
        deadline = time.monotonic() + call.timeout + 1.0  # a rank dumps its stack at the timeout, and is then killed
        while len(results) < len(workers) and time.monotonic() < deadline:
            pending = {workers[rank][1]: rank for rank in range(len(workers)) if rank not in results}
            for ready in wait(list(pending), timeout=max(0.0, deadline - time.monotonic())):
                rank = pending[ready]  # type: ignore[index]
                try:
                    results[rank] = pickle.loads(workers[rank][1].recv_bytes())
                except (EOFError, OSError):
                    results[rank] = (False, f"died (exit code {_exit_code(workers[rank][0])})")
                if not results[rank][0] and not failed:
                    failed, deadline = True, min(deadline, time.monotonic() + _GRACE)
        lost = len(results) < len(workers) or any(not process.is_alive() for process, _ in workers)
        if lost:
            self.kill()
        if lost or failed:
            raise RankError(_report(call, results))
        for _, outcome in results.values():
            if isinstance(outcome, _Skipped):
                importlib.import_module("pytest").skip(str(outcome))
        return [results[rank][1] for rank in range(len(workers))]


def _report(call: _Call, results: dict[int, tuple[bool, Any]]) -> str:
    parts = [f"{call.module}.{call.name} failed on {call.world_size} ranks"]
    for rank in range(call.world_size):
        fine, account = results.get(
            rank, (False, f"did not come back within {call.timeout:g} s or after another failed")
        )
        parts.append(f"---- rank {rank}: {'finished' if fine else account}")
        output = call.output(rank).read_text(errors="replace").strip() if call.output(rank).exists() else ""
        if output:
            parts.append(f"---- rank {rank} wrote:\n{output[-8000:]}")
    return "\n".join(parts)


def _exit_code(process: Any) -> Any:
    process.join(timeout=1.0)
    return process.exitcode


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    main = vars(sys.modules["__main__"])
    saved: dict[str, Any] = {name: main.pop(name) for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(saved)


def _serve(connection: Connection, rank: int) -> None:
    """A rank's life: wait for a call, make it, send back what came of it."""
    torch.set_num_threads(1)
    connection.send_bytes(b"ready")
    while True:
        try:
            call: _Call = pickle.loads(connection.recv_bytes())
        except (EOFError, KeyboardInterrupt):
            return
        with open(call.output(rank), "w", buffering=1) as output, _redirected(output.fileno()):
            faulthandler.dump_traceback_later(call.timeout, file=output)
            try:
                answer = pickle.dumps((True, call.execute(rank)))
            except BaseException as error:
                skipped = type(error).__name__ == "Skipped"  # pytest's, without importing pytest
                answer = pickle.dumps((True, _Skipped(str(error))) if skipped else (False, traceback.format_exc()))
            finally:
                faulthandler.cancel_dump_traceback_later()
        connection.send_bytes(answer)


@contextlib.contextmanager
def _redirected(target: int) -> Iterator[None]:
    """Send file descriptors 1 and 2, and so the output of any library, to ``target``."""
    saved = [os.dup(1), os.dup(2)]
    try:
        for descriptor in (1, 2):
            os.dup2(target, descriptor)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in zip((1, 2), saved):
            os.dup2(original, descriptor)
            os.close(original)


_pool = _Pool()
atexit.register(shutdown)
