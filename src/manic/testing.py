"""Ranks on one CPU for pytest: run a test function on n gloo processes.

    from manic.testing import ranks

    @ranks(2)
    def test_my_sharded_training():
        model = fully_shard(MyModel())   # torch.distributed is initialised, this is rank 0 or 1
        ...

The processes are reused between tests and independent of other pytest-xdist workers: no port is fixed, and each test
has a new process group. A failing rank fails the test with its traceback and output; a hanging rank is killed at the
timeout and its stack is shown.
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
# Attribute of a decorated test: the function that its ranks call.
_ON_EACH_RANK = "__manic_on_each_rank__"
# Seconds that the other ranks have to fail or finish after one rank has failed.
_GRACE = 3.0
# Seconds until a new process has imported torch, on a busy machine.
_START_TIMEOUT = 300.0


class RankError(AssertionError):
    """A function failed or timed out on at least one rank; the message reports every rank."""


def ranks(world_size: int, *, timeout: float = DEFAULT_TIMEOUT) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Decorate a test to run on ``world_size`` gloo ranks.

    The test must be at the top level of its module; its arguments (from ``pytest.mark.parametrize``, or fixtures)
    must be picklable.

    Args:
        world_size: Number of processes.
        timeout: Seconds until the test fails; default: 120.

    Returns:
        The decorator.
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
        function: A function at the top level of a module.
        world_size: Number of processes.
        *args: Its arguments; picklable.
        timeout: Seconds until all ranks are killed; default: 120.
        **kwargs: Its keyword arguments; picklable.

    Returns:
        The function's results, by rank.

    Raises:
        RankError: if the function raised, exited or hung on any rank.
        ValueError: if ``function`` is not at the top level of a module, or ``world_size`` is not positive.
    """
    if world_size < 1:
        raise ValueError(f"world_size must be positive, got {world_size}")
    if "<" in function.__qualname__:
        raise ValueError(
            f"{function.__qualname__} must be at the top level of a module, so that another process can import it"
        )
    __tracebackhide__ = True
    with tempfile.TemporaryDirectory(prefix="manic-ranks-") as folder:
        call = _Call(_importable(function.__module__), function.__qualname__, args, kwargs, world_size, timeout, folder)
        return _pool.run(call)


def shutdown() -> None:
    """End the processes; the next call starts new ones. Called at exit."""
    _pool.kill()


class _Skipped(str):
    """The reason for which a rank skipped."""


def _importable(module: str) -> str:
    """The name by which another process imports ``module``: the script's name for the main module."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    return Path(file).stem if module == "__main__" and file else module


class _Call:
    """A function call for every rank."""

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
        store = dist.PrefixStore(self.folder, _connect(self.port))  # unique to this call
        dist.init_process_group("gloo", store=store, rank=rank, world_size=self.world_size, timeout=timeout)
        try:
            dist.barrier()  # no rank may finish before all have connected
            return target(*self.args, **self.kwargs)
        finally:
            # Without a barrier: a failed rank must not wait for others.
            dist.destroy_process_group()


@functools.cache
def _connect(port: int) -> dist.TCPStore:
    """A rank's connection to the store of the calling process, cached."""
    return dist.TCPStore("127.0.0.1", port, is_master=False)


class _Pool:
    """Reused processes, as many as the largest call; all are replaced after one died or did not answer."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []
        self._store: dist.TCPStore | None = None

    def _grow(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        new = range(len(self._workers), count)
        while len(self._workers) < count:
            here, there = context.Pipe()
            # The ranks must not import the main module: it may be pytest, or a script without a guard.
            with _without_main():
                process = context.Process(target=_serve, args=(there, len(self._workers)), daemon=True)
                process.start()
            there.close()
            self._workers.append((process, here))
        for rank in new:  # importing torch takes seconds, which must not count towards a test's timeout
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
        if self._store is None:  # on a free port, in this process, which outlives every rank
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        call.port = self._store.port
        message = pickle.dumps(call)
        try:
            results, failed = self._ask(workers, message, call.timeout)
        except (
            BaseException
        ):  # a test's timeout, say: answers that nobody waited for would be taken for the next call's
            self.kill()
            raise
        lost = len(results) < len(workers) or any(not process.is_alive() for process, _ in workers)
        if lost:
            self.kill()
        if lost or failed:
            raise RankError(_report(call, results))
        for _, outcome in results.values():
            if isinstance(outcome, _Skipped):
                importlib.import_module("pytest").skip(str(outcome))
        return [results[rank][1] for rank in range(len(workers))]

    @staticmethod
    def _ask(
        workers: list[tuple[Any, Connection]], message: bytes, timeout: float
    ) -> tuple[dict[int, tuple[bool, Any]], bool]:
        """Send a call to every rank; return their outcomes, and whether one failed."""
        for _, connection in workers:
            connection.send_bytes(message)
        results: dict[int, tuple[bool, Any]] = {}
        failed = False
        deadline = time.monotonic() + timeout + 1.0  # a rank dumps its stack at the timeout; then it is killed
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
        return results, failed


def _report(call: _Call, results: dict[int, tuple[bool, Any]]) -> str:
    parts = [f"{call.module}.{call.name} failed on {call.world_size} ranks"]
    for rank in range(call.world_size):
        succeeded, outcome = results.get(
            rank, (False, f"did not finish within {call.timeout:g} s or after another failed")
        )
        parts.append(f"---- rank {rank}: {'finished' if succeeded else outcome}")
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
    """Main loop of a rank: receive a call, execute it, send its outcome."""
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
    """Redirect file descriptors 1 and 2, and with them the output of every library, to ``target``."""
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
