"""Killing ranks, in a step or in a save, loses only the steps since the last checkpoint."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manic.testing import run
from support.jobs import LAUNCH, SMALL, job, records, wait_until
from support.torchrun import children_of, kill_all


def ranks_of(agent: subprocess.Popen[bytes]) -> list[int]:
    """The live processes that torchrun started."""
    found = []
    for pid in children_of(agent.pid):
        with contextlib.suppress(OSError):
            if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def is_saving(directory: Path, since: int = 0) -> bool:
    """Whether there is an unfinished checkpoint, started after ``since``, in nanoseconds of the clock."""
    with contextlib.suppress(FileNotFoundError):
        return any(path.stat().st_mtime_ns > since for path in directory.glob(".incomplete_*"))
    return False


def wait_for_restart(agent: subprocess.Popen[bytes], before: list[int], file: Path) -> int:
    """Wait until two new ranks have taken a step; return the time at which they had started, in nanoseconds."""
    wait_until(lambda: len(ranks_of(agent)) == 2 and not set(ranks_of(agent)) & set(before), agent)
    started = time.time_ns()
    wait_until(lambda: file.exists() and file.stat().st_mtime_ns > started and len(records(file)) > 0, agent)
    return started


def has_reached(file: Path, step: int) -> bool:
    return max(records(file), default=0) >= step


def kill_ranks(tmp_path: Path, kills: int, seed: int, *arguments: str) -> tuple[list[int], int]:
    """Train under torchrun, and kill ranks one after another, half of them while a checkpoint is being written.

    Returns:
        The newest checkpoint at each kill, and the number of kills that left one unfinished.
    """
    rng = random.Random(seed)
    file, checkpoints = tmp_path / "killed.jsonl", tmp_path / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--max-restarts", str(kills), str(LAUNCH / "train.py"), *SMALL, *arguments,
        "--checkpoint-dir", str(checkpoints), "--metrics", str(file),
    ]  # fmt: skip
    reached, unfinished = [], 0
    # As in launch/*.sh: a new store after each restart, without the addresses of dead ranks.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with (tmp_path / "output.txt").open("w") as output:
        agent = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            before: list[int] = []
            for number in range(kills):
                started = wait_for_restart(agent, before, file)
                target = max(records(file)) + rng.randint(0, 20)
                wait_until(functools.partial(has_reached, file, target), agent)
                time.sleep(rng.uniform(0.0, 0.05))
                before, hits_a_save = ranks_of(agent), number == 0 or rng.random() < 0.5
                while hits_a_save and not is_saving(checkpoints, started):
                    assert agent.poll() is None, "the job has ended"
                os.kill(rng.choice(before), signal.SIGKILL)
                unfinished += is_saving(checkpoints, started)
                reached.append(max(step_numbers(checkpoints), default=0))
            assert agent.wait(timeout=600) == 0, (tmp_path / "output.txt").read_text()[-4000:]
        finally:
            kill_all(agent)
    return reached, unfinished


def step_numbers(directory: Path) -> list[int]:
    names = os.listdir(directory) if directory.is_dir() else []
    return [int(name.removeprefix("step_")) for name in names if name.startswith("step_")]


def assert_equals_uninterrupted(tmp_path: Path, kills: int, seed: int, *arguments: str) -> None:
    arguments = ("--steps", str(25 * kills), "--checkpoint-every", "3", *arguments)
    run(job, 2, *arguments, "--metrics", str(tmp_path / "uninterrupted.jsonl"), timeout=280)
    uninterrupted = records(tmp_path / "uninterrupted.jsonl")
    reached, unfinished = kill_ranks(tmp_path, kills, seed, *arguments)
    print(f"{kills} kills, {unfinished} of them while saving; newest checkpoint at each: {reached}")
    assert records(tmp_path / "killed.jsonl") == uninterrupted
    assert reached == sorted(reached), "a checkpoint was lost"
    assert unfinished, "no kill hit a save"
    # With a damaged checkpoint, the script would fall back and still end equally.
    assert not list((tmp_path / "run").glob(".damaged_*"))
    assert "falling back" not in (tmp_path / "output.txt").read_text()
    assert not is_saving(tmp_path / "run")


def test_a_killed_run_equals_an_undisturbed_one(tmp_path: Path) -> None:
    assert_equals_uninterrupted(tmp_path, 2, 1, "--async-save")


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("how", [["--async-save"], []], ids=["async", "sync"])
def test_a_run_killed_thirty_times_equals_an_undisturbed_one(how: list[str], tmp_path: Path) -> None:
    assert_equals_uninterrupted(tmp_path, 30, 7 + len(how), *how)
