"""DeepSpeed's own checkpoints with the real package: a resumed run is the uninterrupted one, bit for bit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from manic.testing import run, shutdown
from support.deepspeed_runs import Run, engine_of, take_step, weights_of
from support.torchrun import by_path, run_example

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


pytestmark = pytest.mark.usefixtures("processes_of_its_own")


SAVED = 6
STEPS = 12
FLOAT32 = [
    *(Run(stage, groups=groups) for stage in range(4) for groups in (1, 2)),
    Run(3, groups=2, sub_group_size=1),
    *(Run(stage, groups=2, variant="optax") for stage in range(4)),
    Run(2, groups=2, offloads=True),
]
LOW = [Run(stage, groups=2, dtype=torch.bfloat16) for stage in range(4)]


def train(engine: Any, optimizer: Any, first: int, last: int) -> list[float]:
    scales = []
    for step in range(first, last):
        take_step(engine, step)
        scales.append(optimizer.scale.item())
    return scales


def resumes(runs: list[Run], folder: Path) -> None:
    for index, each in enumerate(runs):
        engine, optimizer = engine_of(each)
        train(engine, optimizer, 0, SAVED)
        engine.save_checkpoint(folder / str(index))
        expected = train(engine, optimizer, SAVED, STEPS), weights_of(engine)
        engine, optimizer = engine_of(each)
        path, _ = engine.load_checkpoint(folder / str(index))
        assert path is not None, each
        scales, weights = train(engine, optimizer, SAVED, STEPS), weights_of(engine)
        assert scales == expected[0], each
        assert torch.equal(weights, expected[1]), each


@pytest.mark.framework("DeepSpeed", "`save_checkpoint` and `load_checkpoint` on the same ranks: bit for bit")
@pytest.mark.parametrize("runs", [FLOAT32, LOW], ids=["float32", "bfloat16"])
def test_a_resumed_run_is_the_uninterrupted_one(runs: list[Run], tmp_path: Path) -> None:
    run(resumes, 2, runs, tmp_path)


def saves(runs: list[Run], folder: Path) -> float:
    for each in runs:
        engine, optimizer = engine_of(each)
        train(engine, optimizer, 0, SAVED)
        engine.save_checkpoint(folder / str(each.stage))
    return optimizer.scale.item()


def refuses_other_ranks(runs: list[Run], folder: Path) -> None:
    for each in runs:
        engine, _ = engine_of(each)
        with pytest.raises(Exception, match=r"world size|partition"):
            engine.load_checkpoint(folder / str(each.stage))


@pytest.mark.framework("DeepSpeed", "`load_checkpoint` on another number of ranks", limit="refused by DeepSpeed")
def test_other_ranks(tmp_path: Path) -> None:
    runs = [Run(stage) for stage in (1, 2, 3)]
    run(saves, 2, runs, tmp_path)
    shutdown()
    run(refuses_other_ranks, 1, runs, tmp_path)


def convert(folder: Path) -> None:
    """Make a universal checkpoint of the one in ``folder``, as DeepSpeed's users do."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(folder / f"global_step{SAVED}"), "--output_folder", str(folder / "universal")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def goes_on_after_rebase(runs: list[Run], folder: Path, scale: float) -> None:
    for each in runs:
        engine, optimizer = engine_of(each)
        engine.load_checkpoint(folder / str(each.stage), tag="universal")
        with pytest.raises(ValueError, match=r"no rank has an x_ref of any parameter.*or call rebase\(\)"):
            take_step(engine, SAVED)
        engine, optimizer = engine_of(each)
        engine.load_checkpoint(folder / str(each.stage), tag="universal")
        optimizer.rebase()
        assert optimizer.scale.item() == pytest.approx(scale, rel=1e-5), each
        assert scale < train(engine, optimizer, SAVED, STEPS)[-1] < 10 * scale, each


@pytest.mark.framework("DeepSpeed", "universal checkpoints, on other ranks", limit="refused until `optimizer.rebase()`")
def test_universal_checkpoints(tmp_path: Path) -> None:
    runs = [Run(stage, groups=2) for stage in (1, 3)]
    scale, _ = run(saves, 2, runs, tmp_path)
    for each in runs:
        convert(tmp_path / str(each.stage))
    shutdown()
    run(goes_on_after_rebase, 1, [replace(each, is_universal=True) for each in runs], tmp_path, scale)


def starts_anew(runs: list[Run], folder: Path) -> None:
    for each in runs:
        engine, optimizer = engine_of(each)
        train(engine, optimizer, 0, SAVED)
        engine.save_checkpoint(folder / str(each.stage))
        weights = weights_of(engine)
        engine, optimizer = engine_of(each)
        engine.load_checkpoint(folder / str(each.stage), load_optimizer_states=False)
        assert torch.equal(weights_of(engine), weights), each
        assert optimizer.scale.item() == 0.0, each
        assert train(engine, optimizer, SAVED, SAVED + 1)[0] > 0.0, each


@pytest.mark.framework("DeepSpeed", "`load_optimizer_states=False`: a new scale from the loaded weights")
def test_weights_alone(tmp_path: Path) -> None:
    run(starts_anew, 2, [Run(stage, groups=2) for stage in range(4)], tmp_path)


def saved_by_example(folder: Path) -> dict[str, Any]:
    """What the example has saved of the model and of each rank's optimizer."""
    names = ["mp_rank_00_model_states.pt", *(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1))]
    states = [torch.load(folder / "checkpoints" / "global_step10" / name, weights_only=False) for name in names]
    return by_path(
        [states[0]["module"], *(each["optimizer_state_dict"]["base_optimizer_state"] for each in states[1:])]
    )


@pytest.mark.framework("DeepSpeed", "launch/examples/deepspeed_zero.py: trains, and resumes bit for bit")
@pytest.mark.timeout(900)
def test_the_example(tmp_path: Path) -> None:
    run_example("deepspeed_zero.py", tmp_path / "stopped", "--steps", "6")
    resumed = run_example("deepspeed_zero.py", tmp_path / "stopped", "--steps", "10")
    whole = run_example("deepspeed_zero.py", tmp_path / "whole", "--steps", "10")
    assert "resumed at step 6" in resumed
    assert re.search(r"step 10: loss [\d.]+, S [\d.e-]+, lr [\d.e-]+, gradient norm", whole)
    saved = saved_by_example(tmp_path / "whole")
    assert any("mechanic_x_ref" in name for name in saved)
    assert saved_by_example(tmp_path / "stopped") == saved
