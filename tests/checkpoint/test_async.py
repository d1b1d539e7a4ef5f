"""async_save stores the same state as save, and reports its errors."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem
from torch import nn

from manic.checkpoint import Checkpointer
from manic.checkpoint.manifest import MANIFEST
from manic.testing import run
from support.runs import Run, assert_identical

LAYOUTS = [
    ("single", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4), ("tp+fsdp2", 4), ("zero1", 2),
    ("fsdp1-orig", 2), ("fsdp1-flat", 2),
]  # fmt: skip


def compare_save_and_async_save(layout: str, directory: str) -> None:
    torch.manual_seed(dist.get_rank())
    waited_for = Run(layout, "adamw", f"{directory}/sync")
    waited_for.train(6)
    waited_for.checkpointer.save(6)
    waited_for.train(7)

    may_write = threading.Event()
    torch.manual_seed(dist.get_rank())
    started = Run(layout, "adamw", f"{directory}/async", progress=lambda *_: may_write.wait(60) and None)
    started.train(6)
    future = started.checkpointer.async_save(6)
    started.train(7)  # nothing is written before it finishes
    assert not future.done()
    assert started.checkpointer.steps() == []
    may_write.set()
    assert future.result() == f"{directory}/async/step_00000006"
    assert started.checkpointer.steps() == [6]
    assert_identical(started.result(), waited_for.result())

    resumed = Run(layout, "adamw", f"{directory}/async")
    resumed.backward()
    resumed.checkpointer.load()
    resumed.train(7)
    assert_identical(resumed.result(), waited_for.result())


@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS)
def test_async_save_equals_save_bit_for_bit(layout: str, world_size: int, tmp_path: Path) -> None:
    run(compare_save_and_async_save, world_size, layout, str(tmp_path))
    sync, threaded = (
        json.loads((tmp_path / kind / "step_00000006" / MANIFEST).read_text()) for kind in ("sync", "async")
    )
    # .metadata holds the path.
    assert {**sync["files"], ".metadata": None} == {**threaded["files"], ".metadata": None}
    assert sync["layout"] == threaded["layout"]


def save_in_a_row(directory: str) -> list[int]:
    started = Run("fsdp2", "adamw", directory, keep_latest=3)
    futures = []
    for step in range(1, 6):
        started.train(1)
        futures.append(started.checkpointer.async_save(step))
        assert all(future.done() for future in futures[:-1])
    started.checkpointer.wait()
    expected = started.result()
    started.train(2)
    started.checkpointer.load()
    assert_identical(started.result(), expected)
    return started.checkpointer.steps()


def test_async_saves_run_one_at_a_time_with_retention(tmp_path: Path) -> None:
    assert run(save_in_a_row, 2, str(tmp_path)) == [[3, 4, 5]] * 2


def fail_to_write(directory: str, on_error: str, threaded: bool) -> list[str]:
    """Rank 1 may write at most 20 kB to a file, as on a full disk."""
    started = Run("fsdp2", "adamw", directory, on_error=on_error)
    started.train(2)
    started.checkpointer.save(2)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("manic.checkpoint").addHandler(handler)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        if threaded:
            started.checkpointer.async_save(3)
            started.train(1)
        if on_error == "raise":
            with pytest.raises(OSError, match=r"could not write.*rank 1.*File too large"):
                started.checkpointer.wait() if threaded else started.checkpointer.save(3)
        else:
            assert (started.checkpointer.wait() if threaded else started.checkpointer.save(3)) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
        logging.getLogger("manic.checkpoint").removeHandler(handler)
    if on_error == "warn" and dist.get_rank() == 0:
        assert ["step 3 is not saved" in message for message in messages] == [True]
    assert started.checkpointer.steps() == [2]
    started.train(1)
    assert started.checkpointer.save(4) == started.checkpointer.path(4)
    started.checkpointer.load(2)
    return sorted(os.listdir(directory))


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_full_disk_loses_only_that_checkpoint(on_error: str, threaded: bool, tmp_path: Path) -> None:
    for names in run(fail_to_write, 2, str(tmp_path), on_error, threaded):
        assert names == ["step_00000002", "step_00000004"]


def save_to_a_read_only_directory(directory: str, on_error: str) -> list[int]:
    started = Run("fsdp2", "adamw", directory, on_error=on_error)
    started.train(1)
    started.checkpointer.save(1)
    if dist.get_rank() == 0:
        os.chmod(directory, 0o555)
    dist.barrier()
    user = os.geteuid()
    if user == 0:  # root ignores the directory's mode
        os.seteuid(65534)
    try:
        if on_error == "raise":
            for save in (started.checkpointer.save, started.checkpointer.async_save):
                with pytest.raises(PermissionError, match="Permission denied"):
                    save(2)
        else:
            assert started.checkpointer.save(2) is None
            assert started.checkpointer.async_save(2).result() is None
        started.train(1)
        assert started.checkpointer.steps() == [1]
    finally:
        os.seteuid(user)
        dist.barrier()
        if dist.get_rank() == 0:
            os.chmod(directory, 0o755)
    dist.barrier()
    started.checkpointer.load()
    started.checkpointer.save(2)
    return started.checkpointer.steps()


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_read_only_directory_affects_only_the_save(on_error: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # other users cannot read tmp_path
        os.chmod(folder, 0o755)
        directory = Path(folder, "run")
        directory.mkdir()
        assert run(save_to_a_read_only_directory, 2, str(directory), on_error) == [[1, 2]] * 2


def save_to_a_full_disk(directory: str) -> list[str]:
    started = Run("fsdp2", "adamw", directory, keep_latest=1)
    started.train(1)
    started.checkpointer.save(1)
    ballast = Path(directory, "ballast")
    if dist.get_rank() == 1:
        ballast.write_bytes(b"0" * 300_000)
    dist.barrier()
    with pytest.raises(OSError, match="No space left on device"):
        started.checkpointer.save(2)
    if dist.get_rank() == 1:
        ballast.unlink()
    dist.barrier()
    started.checkpointer.load(1)
    started.checkpointer.save(3)
    return sorted(os.listdir(directory))


def test_recovers_from_a_full_disk(tmp_path: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("not allowed to mount a small file system")
    try:
        assert run(save_to_a_full_disk, 2, str(tmp_path)) == [["step_00000003"]] * 2
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def measure_host_memory(directory: str, threaded: bool) -> tuple[int, int]:
    """Bytes of the state, and the rise of this process's peak memory during a save."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16)))
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    optimizer.zero_grad()
    checkpointer = Checkpointer(directory, model, optimizer)
    small = nn.Linear(2, 2)
    warm = Checkpointer(f"{directory}/warm", small, torch.optim.AdamW(small.parameters()))
    (warm.async_save if threaded else warm.save)(0)
    warm.wait()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current memory
    before = _status("VmRSS")
    (checkpointer.async_save if threaded else checkpointer.save)(1)
    checkpointer.wait()
    return 3 * 16 * 1024 * 1024 * 4, _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("threaded", [False, True])
def test_host_memory_of_a_save(threaded: bool, tmp_path: Path) -> None:
    state, rise = run(measure_host_memory, 1, str(tmp_path), threaded)[0]
    buffer = 32 * 2**20
    assert rise < buffer + threaded * state, (rise, state)


def record_progress(directory: str) -> list[tuple[str, int, int]]:
    events: list[tuple[str, int, int]] = []
    started = Run("fsdp2", "adamw", directory, progress=lambda *event: events.append(event))
    started.checkpointer.save(1)
    started.checkpointer.load()
    return events


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    by_rank = run(record_progress, 2, str(tmp_path))
    manifest = json.loads((tmp_path / "step_00000001" / MANIFEST).read_text())
    for rank, events in enumerate(by_rank):
        for what in ("save", "verify"):
            done = [event[1] for event in events if event[0] == what]
            assert done == sorted(done)
            assert done
        own = manifest["files"][f"__{rank}_0.distcp"]["bytes"] + (
            manifest["files"][".metadata"]["bytes"] if rank == 0 else 0
        )
        assert max(event[1] for event in events if event[0] == "save") == own
    per_rank = [max(event[1] for event in events if event[0] == "verify") for events in run(reload, 2, str(tmp_path))]
    assert sum(per_rank) == sum(record["bytes"] for record in manifest["files"].values())


def reload(directory: str) -> list[tuple[str, int, int]]:
    events: list[tuple[str, int, int]] = []
    Run("fsdp2", "adamw", directory, progress=lambda *event: events.append(event)).checkpointer.load()
    return events


class Unpicklable(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)


class Failing:
    """A method that raises an error which does not pickle."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise Unpicklable(503, "slow down")


def fail_without_os_error(directory: str, on_error: str) -> list[str]:
    started = Run("fsdp2", "adamw", directory, on_error=on_error)
    started.checkpointer.save(1)
    real = LocalFileSystem.open
    if dist.get_rank() == 0:
        LocalFileSystem.open = Failing()
    try:
        if on_error == "raise":
            with pytest.raises(OSError, match="Unpicklable: slow down"):
                started.checkpointer.save(2)
        else:
            assert started.checkpointer.save(2) is None
    finally:
        LocalFileSystem.open = real
    started.train(1)
    started.checkpointer.save(3)
    return sorted(os.listdir(directory))


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_every_write_error_is_an_os_error_on_every_rank(on_error: str, tmp_path: Path) -> None:
    for names in run(fail_without_os_error, 2, str(tmp_path), on_error, timeout=60):
        assert names == ["step_00000001", "step_00000003"]


def save_a_failing_object(directory: str) -> None:
    started = Run("fsdp2", "adamw", directory)
    if dist.get_rank() == 1:
        started.counter.state_dict = Failing()  # type: ignore[method-assign]
    for save in (started.checkpointer.save, started.checkpointer.async_save):
        with pytest.raises(RuntimeError, match="Unpicklable: slow down"):
            save(1)


def test_an_object_that_fails_on_one_rank_raises_on_every_rank(tmp_path: Path) -> None:
    run(save_a_failing_object, 2, str(tmp_path), timeout=60)


def save_to_an_unshared_directory(directory: str) -> list[int]:
    started = Run("fsdp2", "adamw", f"{directory}/{dist.get_rank()}")
    real, elsewhere = LocalFileSystem.open, Path(directory, "1", "elsewhere")

    def open_elsewhere(files: LocalFileSystem, path: str, *args: Any, **kwargs: Any) -> Any:
        return real(files, str(elsewhere / Path(path).name), *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:  # its files are elsewhere, as on a node's local disk
            elsewhere.mkdir(parents=True)
            patch.setattr(LocalFileSystem, "open", open_elsewhere)
        with pytest.raises(OSError, match=r"__1_0\.distcp is missing.*same directory"):
            started.checkpointer.save(1)
    return started.checkpointer.steps()


def test_the_first_save_detects_an_unshared_directory(tmp_path: Path) -> None:
    assert run(save_to_an_unshared_directory, 2, str(tmp_path), timeout=60) == [[], []]


def save_after_a_failure(directory: str) -> list[int]:
    started = Run("fsdp2", "adamw", directory)
    started.checkpointer.save(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    future = started.checkpointer.async_save(2)
    assert future.exception() is not None
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, ignored)
    with pytest.raises(OSError, match="step_00000002"):
        started.checkpointer.save(3)
    return started.checkpointer.steps()


def test_save_completes_before_it_raises_an_earlier_failure(tmp_path: Path) -> None:
    assert run(save_after_a_failure, 2, str(tmp_path), timeout=60) == [[1, 3]] * 2


def save_with_failing_callback(directory: str) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    started = Run("fsdp2", "adamw", directory, progress=fail if dist.get_rank() == 1 else None)
    started.checkpointer.save(1)
    started.checkpointer.load(fallback=True)


def test_a_failing_progress_callback_does_not_fail_the_save(tmp_path: Path) -> None:
    run(save_with_failing_callback, 2, str(tmp_path), timeout=60)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
