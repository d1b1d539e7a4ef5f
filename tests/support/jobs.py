"""A small run of launch/train.py: run it on ranks, wait for it, and read its records."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from gpt.report import read_records
from train import parse, train

LAUNCH = Path(__file__).parents[2] / "launch"
SMALL = (
    "--layers 2 --width 32 --heads 4 --seq-len 32 --batch-size 8 --device cpu --log-every 1 --eval-every 0 "
    f"--data {Path(__file__).parent / 'golden'} "
    "--variant optax --lr 300"  # the scale starts at 6e-6, so that a few steps have a visible displacement
).split()


def job(*arguments: str) -> None:
    train(parse([*SMALL, *arguments]), torch.device("cpu"))


def records(file: Path) -> dict[int, dict[str, Any]]:
    """The metrics that do not depend on time, by step."""
    kept = ("loss", "scale", "lr", "h", "grad_norm", "param_norm")
    return {r["step"]: {k: r[k] for k in kept if k in r} for r in read_records(file) if "loss" in r}


def wait_until(condition: Any, process: subprocess.Popen[bytes], timeout: float = 120.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, "the job has ended"
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
