"""launch/train.py trains in every mode, and a stopped or killed run resumes equal to an uninterrupted one."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt.parallel import MODES
from gpt.report import read_records
from manic.testing import RankError, run
from support.jobs import LAUNCH, SMALL, job, records, wait_until
from support.torchrun import kill_all
from train import parse, train

ADAMW = [(mode, "adamw") for mode in MODES]


@functools.cache
def single_process(base: str, variant: str) -> dict[int, dict[str, Any]]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "m.jsonl")
        arguments = ["--parallel", "none", "--base-optimizer", base, "--variant", variant, "--steps", "8"]
        run(job, 1, *arguments, "--metrics", str(file))
        return records(file)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("mode", "base", "variant"), [
    *((mode, "adamw", "optax") for mode in MODES),
    ("fsdp2", "muon", "optax"), ("tp", "muon", "multiplicative"), ("zero1", "sgd", "multiplicative"),
    ("fsdp2", "adamw", "multiplicative"), ("fsdp1", "adamw", "multiplicative"),
])  # fmt: skip
def test_every_mode_trains_equally_and_resumes_bit_for_bit(
    mode: str, base: str, variant: str, world_size: int, tmp_path: Path
) -> None:
    if base == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip(f"torch {torch.__version__} has no Muon")
    arguments = ["--parallel", mode, "--base-optimizer", base, "--variant", variant, "--steps", "8"]
    saving = ["--checkpoint-dir", str(tmp_path / "run"), "--checkpoint-every", "4", "--keep-latest", "9"]
    run(job, world_size, *arguments, *saving, "--metrics", str(tmp_path / "whole.jsonl"))
    whole = records(tmp_path / "whole.jsonl")
    assert sorted(whole) == list(range(1, 9))
    for step, record in single_process(base, variant).items():
        assert whole[step]["loss"] == pytest.approx(record["loss"], rel=2e-4), step
        assert whole[step]["scale"] == pytest.approx(record["scale"], rel=2e-2), step

    later = str(tmp_path / "run" / "step_00000004")
    again = [
        "--checkpoint-dir",
        str(tmp_path / "again"),
        "--resume",
        later,
        "--metrics",
        str(tmp_path / "resumed.jsonl"),
    ]
    run(job, world_size, *arguments, *again)
    assert records(tmp_path / "resumed.jsonl") == {step: whole[step] for step in range(5, 9)}


def test_a_scale_per_group(tmp_path: Path) -> None:
    arguments = ["--parallel", "fsdp2", "--variant", "multiplicative", "--lr", "1", "--scale"]
    saving = ["--checkpoint-dir", str(tmp_path / "run"), "--metrics", str(tmp_path / "m.jsonl"), "--resume", "auto"]
    for steps in ("3", "6"):
        run(job, 2, *arguments, "per group", *saving, "--steps", steps)
    found = [record for record in read_records(tmp_path / "m.jsonl") if "loss" in record]
    assert [record["step"] for record in found] == list(range(1, 7))
    assert all(record["scale/0"] > 0 and record["scale/1"] > 0 and "scale" not in record for record in found)
    with pytest.raises(RankError, match="a scale for each of 2 param group"):
        run(job, 2, *arguments, "global", *saving, "--steps", "8")


def test_resumes_on_another_number_of_ranks(tmp_path: Path) -> None:
    arguments = ["--steps", "8", "--checkpoint-dir", str(tmp_path / "run"), "--checkpoint-every", "4"]
    run(job, 4, *arguments, "--keep-latest", "9", "--metrics", str(tmp_path / "four.jsonl"))
    four = records(tmp_path / "four.jsonl")
    (tmp_path / "run" / "step_00000008").rename(tmp_path / "elsewhere")
    run(job, 2, *arguments, "--metrics", str(tmp_path / "two.jsonl"))
    two = records(tmp_path / "two.jsonl")
    assert sorted(two) == [5, 6, 7, 8]
    for step, record in two.items():
        assert record["loss"] == pytest.approx(four[step]["loss"], rel=1e-4)
        assert record["scale"] == pytest.approx(four[step]["scale"], rel=1e-2)


def test_learns_more_than_byte_frequencies(tmp_path: Path) -> None:
    from gpt.data import Corpus

    arguments = "--layers 2 --width 64 --heads 2 --seq-len 64 --batch-size 16 --device cpu --steps 250 --log-every 10"
    file = tmp_path / "m.jsonl"
    run(train_with, 2, [*arguments.split(), "--metrics", str(file), "--eval-every", "0"], timeout=250)
    found = read_records(file)
    assert found[-1]["eval_loss"] < Corpus(None, 64).unigram_entropy() - 0.7
    assert found[0]["scale"] < 1e-3
    assert 1e-3 < found[-2]["scale"] < 1e-1
    assert file.with_suffix(".png").stat().st_size > 10_000


def train_with(arguments: list[str]) -> None:
    train(parse(arguments), torch.device("cpu"))


@pytest.mark.parametrize(("arguments", "words"), [
    (["--data", "nowhere/at/all"], "no such file or folder"),
    (["--seq-len", "100000"], "needs at least"),
    (["--heads", "3"], "not a multiple of --heads 3"),
    (["--heads", "1", "--parallel", "tp"], "not a multiple of 2 ranks"),
    (["--batch-size", "7"], "not a multiple of 2 ranks"),
    (["--base-optimizer", "muon", "--parallel", "zero1"], "muon needs whole matrices"),
    (["--resume", "nowhere/at/all", "--checkpoint-dir", "x"], "neither a checkpoint nor"),
], ids=lambda a: a[0] if isinstance(a, list) else "")  # fmt: skip
def test_reports_user_errors_on_every_rank(arguments: list[str], words: str) -> None:
    with pytest.raises(RankError) as caught:
        run(job, 2, *arguments, "--steps", "1")
    assert str(caught.value).count(words) >= 2


def test_refuses_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    directory = ["--checkpoint-dir", str(tmp_path)]
    run(job, 2, "--steps", "2", *directory, "--checkpoint-every", "1")
    for arguments, words in (
        (["--layers", "1"], "another model"),
        (["--width", "64"], "has shape"),
        (["--seed", "5"], "the checkpoint has --seed 0"),
        (["--batch-size", "16"], "the checkpoint has --batch-size 8"),
        (["--resume", "never"], "already holds a run"),
        (["--variant", "pytorch"], "of variant optax"),
        (["--tuner", "none"], "the checkpoint has --tuner mechanic"),
        (["--resume", str(tmp_path / "step_00000001")], "up to step 2"),
    ):
        with pytest.raises(RankError) as caught:
            run(job, 2, "--steps", "4", *directory, *arguments)
        assert str(caught.value).count(words) >= 2, words


@pytest.mark.parametrize("number", [
    signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL,
], ids=lambda s: s.name)  # fmt: skip
def test_resumes_bit_for_bit_after_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    """Started by torchrun."""
    arguments = ["--steps", "40", "--checkpoint-every", "7"]
    run(job, 2, *arguments, "--metrics", str(tmp_path / "whole.jsonl"))
    whole = records(tmp_path / "whole.jsonl")

    file = tmp_path / "stopped.jsonl"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(LAUNCH / "train.py"), *SMALL, *arguments, "--checkpoint-dir", str(tmp_path / "run"), "--metrics", str(file),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "first.txt").open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            wait_until(lambda: file.exists() and len(records(file)) >= 10, process)
            if number == signal.SIGKILL:
                kill_all(process)
            else:
                process.send_signal(number)
            process.wait(timeout=120)
        finally:
            kill_all(process)
    done = sorted(records(file))
    assert len(done) < 40, "the run ended before the signal arrived"
    if number != signal.SIGKILL:
        assert "stopped after step" in (tmp_path / "first.txt").read_text()
        assert (tmp_path / "run" / f"step_{done[-1]:08d}").is_dir()

    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert "resumed at step" in finished.stdout + finished.stderr
    assert "held-out loss" in finished.stdout + finished.stderr
    assert records(file) == whole
    assert json.loads(file.read_text().splitlines()[-1])["eval_loss"] > 0
