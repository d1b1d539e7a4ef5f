"""A damaged checkpoint is never loaded silently, and fallback loads an older intact one."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import logging
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from manic.checkpoint import DamagedCheckpointError
from manic.checkpoint.files import Files
from manic.checkpoint.manifest import MANIFEST, render
from manic.testing import run
from support.runs import Run, assert_identical

STEPS = [2, 4, 6]
SEEDS = range(260)


def save_three(directory: str) -> list[tuple[float, dict[str, torch.Tensor]]]:
    started, results = Run("fsdp2", "adamw", directory), []
    for step in STEPS:
        started.train(2)
        started.checkpointer.save(step)
        results.append(started.result())
    return results


@functools.cache
def intact() -> tuple[tempfile.TemporaryDirectory[str], list[Any]]:
    """Checkpoints of two ranks, and the state at each."""
    directory = tempfile.TemporaryDirectory(prefix="manic-damage-")
    return directory, run(save_three, 2, directory.name)[0]


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact()[0].name, tmp_path / "run"))


@functools.cache
def single_run() -> Run:
    """One run that every damaged checkpoint is loaded into."""
    return Run("single", "adamw", "unused")


def run_in(directory: Path) -> Run:
    fresh = single_run()
    fresh.checkpointer = type(fresh.checkpointer)(
        directory,
        fresh.setup.model,
        fresh.setup.optimizer,
        objects={"counter": fresh.counter, "scheduler": fresh.scheduler},
    )
    return fresh


def folder(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}"


def damage(directory: Path, step: int, rng: random.Random) -> str:
    """Damage one file of a checkpoint so that its bytes change; return a description."""
    others = [other for other in STEPS if other != step]
    while True:
        file = rng.choice(sorted(folder(directory, step).iterdir()))
        content = file.read_bytes()
        kind = rng.choice(["truncate", "empty", "flip a bit", "flip a byte", "zero a page", "append", "delete", "swap"])
        position = rng.randrange(len(content))
        if kind == "truncate":
            file.write_bytes(content[:position])
        elif kind == "empty":
            file.write_bytes(b"")
        elif kind == "flip a bit":
            flipped = bytes([content[position] ^ (1 << rng.randrange(8))])
            file.write_bytes(content[:position] + flipped + content[position + 1 :])
        elif kind == "flip a byte":
            file.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        elif kind == "zero a page":
            file.write_bytes(
                content[:position] + b"\0" * len(content[position : position + 4096]) + content[position + 4096 :]
            )
        elif kind == "append":
            file.write_bytes(content + b"\n")
        elif kind == "delete":
            file.unlink()
        else:
            other = folder(directory, rng.choice(others)) / file.name
            other_content = other.read_bytes()
            file.write_bytes(other_content)
        if not file.exists() or file.read_bytes() != content:
            return f"{kind} {file.name}"


@pytest.mark.parametrize("seed", SEEDS)
def test_never_loads_a_damaged_checkpoint(seed: int, copies: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(seed)
    what = damage(copies, STEPS[-1], rng)
    fresh = run_in(copies)
    before = fresh.result()
    with pytest.raises(DamagedCheckpointError) as caught:
        fresh.checkpointer.load()
    assert "step_00000006" in str(caught.value)
    assert what.split()[-1] in str(caught.value), what
    assert_identical(fresh.result(), before)
    with caplog.at_level(logging.WARNING):
        assert fresh.checkpointer.load(fallback=True) == str(folder(copies, STEPS[-2]))
    assert what.split()[-1] in caplog.text
    assert_identical(fresh.result(), intact()[1][-2])


def test_size_check_detects_a_truncated_file(copies: Path) -> None:
    file = folder(copies, 6) / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpointError, match=r"__1_0\.distcp has \d+ bytes; \d+ were written"):
        run_in(copies).checkpointer.load(verify="size")


@pytest.mark.parametrize("seed", range(20))
def test_size_check_detects_a_damaged_index(seed: int, copies: Path) -> None:
    rng = random.Random(seed)
    file = folder(copies, 6) / ".metadata"
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"\.metadata differs from what was written"):
        run_in(copies).checkpointer.load(verify="size")


def test_detects_a_checkpoint_in_the_folder_of_another_step(copies: Path) -> None:
    shutil.rmtree(folder(copies, 6))
    shutil.copytree(folder(copies, 2), folder(copies, 6))
    with pytest.raises(DamagedCheckpointError, match=r"its manifest.json is of step 2"):
        run_in(copies).checkpointer.load()


def test_lists_every_checkpoint_if_none_is_intact(copies: Path) -> None:
    for step in STEPS:
        (folder(copies, step) / "__0_0.distcp").unlink()
    with pytest.raises(DamagedCheckpointError) as caught:
        run_in(copies).checkpointer.load(fallback=True)
    for step in STEPS:
        assert f"step_{step:08d} is damaged: __0_0.distcp is missing" in str(caught.value)


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata"])
def test_an_unverified_unreadable_file_is_damage(name: str, copies: Path) -> None:
    file = folder(copies, 6) / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DamagedCheckpointError, match=r"step_00000006.*cannot be read"):
        run_in(copies).checkpointer.load(verify="off")


def test_loads_without_a_manifest_only_with_verify_off(copies: Path) -> None:
    (folder(copies, 6) / MANIFEST).unlink()
    with pytest.raises(DamagedCheckpointError, match='pass verify="off"'):
        run_in(copies).checkpointer.load()
    fresh = run_in(copies)
    fresh.checkpointer.load(verify="off")
    assert_identical(fresh.result(), intact()[1][-1])


def test_a_read_error_is_damage(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Files.read

    def read(files: Files, name: str) -> bytes:
        if "00000006" in files.root:
            raise OSError(errno.EIO, "Input/output error")
        return whole(files, name)

    monkeypatch.setattr(Files, "read", read)
    fresh = run_in(copies)
    with pytest.raises(DamagedCheckpointError, match=r"manifest.json cannot be read: .*Input/output error"):
        fresh.checkpointer.load()
    assert fresh.checkpointer.load(fallback=True) == str(folder(copies, 4))


def test_syncs_every_file_after_its_last_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: dict[str, int] = {}
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        synced[os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))] = os.fstat(descriptor).st_size
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    saved = run_in(tmp_path).checkpointer.save(1)
    for file in Path(str(saved)).iterdir():
        name = ".metadata.tmp" if file.name == ".metadata" else file.name
        assert synced[name] == file.stat().st_size


def test_a_failed_listing_after_a_save_does_not_fail_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = run_in(Path("unused"))
    url = "memory://test-damage/run"
    checkpointer = type(fresh.checkpointer)(url, fresh.setup.model, fresh.setup.optimizer, keep_latest=1)
    checkpointer.save(1)
    steps, calls = checkpointer.steps, itertools.count()

    def fail_at_the_end() -> list[int]:
        if next(calls) == 0:
            raise OSError("the listing timed out")
        return steps()

    monkeypatch.setattr(checkpointer, "steps", fail_at_the_end)
    checkpointer.save(2)
    assert checkpointer.steps() == [1, 2]


def test_refuses_a_newer_format(copies: Path) -> None:
    path = folder(copies, 6) / MANIFEST
    content = json.loads(path.read_text())
    content.pop("sha256")
    path.write_bytes(render({**content, "format": 2, "what is new": 1}))
    with pytest.raises(ValueError, match=r"format 2.*install a newer version"):
        run_in(copies).checkpointer.load()


def test_fallback_requires_latest(copies: Path) -> None:
    with pytest.raises(ValueError, match="fallback=True requires"):
        run_in(copies).checkpointer.load(6, fallback=True)
    with pytest.raises(ValueError, match="verify must be"):
        run_in(copies).checkpointer.load(verify="sha256")  # type: ignore[arg-type]


def fall_back_and_continue(directory: str) -> tuple[str, list[int], Any]:
    """Rank 1's file of the newest checkpoint is damaged: the run falls back, continues, and saves the same steps."""
    resumed = Run("fsdp2", "adamw", directory)
    with pytest.raises(DamagedCheckpointError, match=r"__1_0\.distcp"):
        resumed.checkpointer.load()
    loaded = resumed.checkpointer.load(fallback=True)
    resumed.train(2)
    resumed.checkpointer.save(6)
    return loaded, resumed.checkpointer.steps(), resumed.result()


def test_a_save_after_a_fallback_replaces_the_damaged_checkpoint(copies: Path) -> None:
    file = folder(copies, 6) / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for loaded, steps, result in run(fall_back_and_continue, 2, str(copies)):
        assert loaded == str(folder(copies, 4))
        assert steps == STEPS
        assert_identical(result, intact()[1][-1])
    assert (copies / ".damaged_step_00000006").is_dir()
