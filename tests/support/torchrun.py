"""A script under torchrun: run an example on two CPU ranks, kill all ranks, and read what was saved."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

EXAMPLES = Path(__file__).parents[2] / "launch" / "examples"


def run_example(name: str, output: Path, *arguments: str, timeout: float = 400.0) -> str:
    """Run it under torchrun, and return what it has printed; it must succeed, and no rank outlives this call."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*torchrun, str(EXAMPLES / name), "--output", str(output), *arguments],
        # DeepSpeed compiles there, and waits for a lock that a killed run leaves.
        env={
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TORCH_EXTENSIONS_DIR": str(output.parent / "extensions"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        printed, errors = process.communicate(timeout=timeout)
    finally:
        kill_all(process)
    assert process.returncode == 0, printed + errors
    return printed


def children_of(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def kill_all(process: subprocess.Popen[Any]) -> None:
    """Kill torchrun and its ranks, which have separate sessions and would outlive it."""
    for pid in (*children_of(process.pid), process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def by_path(saved: Any) -> dict[str, Any]:
    """The leaves of nested dicts and lists by their place, so that the order of keys does not matter."""
    leaves, _ = tree_flatten_with_path(saved)
    return {keystr(path): each.tolist() if isinstance(each, torch.Tensor) else each for path, each in leaves}
