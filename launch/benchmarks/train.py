"""Tokens per second of launch/train.py with and without the tuner."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

TRAIN = Path(__file__).parents[1] / "train.py"
TUNERS = ("none", "mechanic")


def speeds(tuner: str, ranks: int, steps: int, extra: Sequence[str], folder: Path) -> list[float]:
    """Train once; return tokens per second of every ten steps, without the first ten."""
    metrics = folder / f"{tuner}.jsonl"
    metrics.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(TRAIN),
        "--tuner", tuner, "--steps", str(steps), "--log-every", "10", "--eval-every", "0", "--metrics", str(metrics),
        *extra,
    ]  # fmt: skip
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [record["tokens_per_s"] for record in records if "tokens_per_s" in record][1:]


def measure(ranks: int, steps: int, repeats: int, extra: Sequence[str]) -> dict[str, float]:
    """Median tokens per second by tuner; the runs alternate, so that noise of the machine affects both equally."""
    found: dict[str, list[float]] = {tuner: [] for tuner in TUNERS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            for tuner in TUNERS:
                found[tuner] += speeds(tuner, ranks, steps, extra, Path(folder))
    return {tuner: statistics.median(values) for tuner, values in found.items()}


def table(found: dict[str, float]) -> str:
    """A Markdown table of the speeds."""
    rows = [f"| {tuner} | {speed:,.0f} | {speed / found['none']:.3f} |" for tuner, speed in found.items()]
    return "\n".join(["| tuner | tokens/s | over none |", "| --- | --- | --- |", *rows])
