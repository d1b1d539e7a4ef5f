"""A script of launch/examples on two CPU ranks, in processes of its own, and what it has saved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

EXAMPLES = Path(__file__).parents[2] / "launch" / "examples"


def run_example(name: str, output: Path, *arguments: str, timeout: float = 400.0) -> str:
    """Run it under torchrun, and return what it has printed; it must succeed."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(EXAMPLES / name), "--output", str(output), *arguments],
        # DeepSpeed compiles there, and waits for a lock that a killed run leaves.
        env={
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "TORCH_EXTENSIONS_DIR": str(output.parent / "extensions"),
        },
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def by_path(saved: Any) -> dict[str, Any]:
    """The leaves of nested dicts and lists by their place, so that the order of keys does not matter."""
    leaves, _ = tree_flatten_with_path(saved)
    return {keystr(path): each.tolist() if isinstance(each, torch.Tensor) else each for path, each in leaves}
