"""Small checkpoints of a version of manic, and what the run that wrote them does next.

They are kept in tests/checkpoint/versions, so that later versions are tested with files that earlier ones wrote:

    PYTHONPATH=src:tests python -m support.versions tests/checkpoint/versions

makes the folder of the version that is installed, and refuses to write over one that is there.
"""

from __future__ import annotations

import json
import random
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import manic
from manic import Mechanic
from manic.checkpoint import Checkpointer
from manic.testing import run

SAVED_AFTER, GOES_ON = 5, 3
"""Steps before the checkpoint, and steps after it whose outcome is stored."""

PLAIN = "plain"
"""The kind of a state dict that torch.save wrote."""

KINDS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "multiplicative": {},
    "optax": {"variant": "optax", "s_init": 1e-3},
    "per-group": {"scale": "per group"},
}
"""Options of Mechanic. Kinds that a version was saved with stay here."""

ARCHIVE, NEXT = "checkpoints.tar.xz", "next.json"
"""In a version's folder: a folder for each kind and number of ranks, ``optax-2``; and what comes next, by their names.
Packed, because DCP's many small tensors are mostly padding."""


class Job:
    """A linear model with a group for each parameter. On two ranks a shard of 2 rows and one of 1, or DDP's copies."""

    def __init__(self, options: dict[str, Any], *, is_sharded: bool = True) -> None:
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.model = nn.Linear(4, 3)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(_numbers(parameter.shape, 0))
        self.forward: nn.Module = self.model
        if self.world > 1:
            self.forward = self.model if is_sharded else DistributedDataParallel(self.model)
            if is_sharded:
                fully_shard(self.model)
        groups: list[dict[str, Any]] = [
            {"params": [self.model.weight]},
            {"params": [self.model.bias], "weight_decay": 0.0},
        ]
        self.optimizer = Mechanic(torch.optim.AdamW(groups, lr=1.0, weight_decay=0.1), **options)

    def train(self, steps: range) -> None:
        """Take steps; each rank has its share of the same 4 rows."""
        share = 4 // self.world
        mine = slice(self.rank * share, (self.rank + 1) * share)
        for step in steps:
            x = _numbers((4, 4), step)
            y = torch.stack((x[:, 0] * x[:, 1], x[:, 2], x.sum(dim=1)), dim=1)
            self.optimizer.zero_grad()
            (self.forward(x[mine]) - y[mine]).square().mean().backward()
            self.optimizer.step()

    def outcome(self) -> dict[str, Any]:
        """The scale, or one for each group, and all values of each parameter."""
        values = {name: _whole(parameter).flatten().tolist() for name, parameter in self.model.named_parameters()}
        return {"scale": self.optimizer.scale.tolist(), "parameters": values}


def _numbers(shape: Any, seed: int) -> Tensor:
    """Numbers in (-1, 1) that no random generator makes, so that they are the same in every version of torch."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float64) * 1.7 + seed).float().reshape(shape)


def _whole(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def go_on(folder: str, kind: str) -> dict[str, Any]:
    """Load a checkpoint, or the state dict, in a new run on all ranks, take further steps, and return the outcome."""
    job = Job(KINDS[kind], is_sharded=kind != PLAIN)
    if kind == PLAIN:
        saved = torch.load(Path(folder, "state.pt"), weights_only=True)
        job.model.load_state_dict(saved["model"])
        job.optimizer.load_state_dict(saved["optimizer"])
    else:
        Checkpointer(folder, job.model, job.optimizer).load()
    job.train(range(SAVED_AFTER, SAVED_AFTER + GOES_ON))
    return job.outcome()


def _save(folder: str, kind: str) -> dict[str, Any]:
    random.seed(0)  # random states that are all the same need no space
    torch.manual_seed(0)
    job = Job(KINDS[kind])
    job.train(range(SAVED_AFTER))
    if kind == PLAIN:
        state = {"model": job.model.state_dict(), "optimizer": job.optimizer.state_dict()}
        torch.save(state, Path(folder, "state.pt"))
    else:
        Checkpointer(folder, job.model, job.optimizer).save(SAVED_AFTER)
    job.train(range(SAVED_AFTER, SAVED_AFTER + GOES_ON))
    return job.outcome()


def make(versions: Path) -> Path:
    """Write this version's folder, and return it.

    Raises:
        FileExistsError: if it is there: the files of a version are what that version wrote, and stay.
    """
    folder = versions / manic.__version__
    folder.mkdir(parents=True)
    outcomes = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in KINDS:
            for ranks in (1,) if kind == PLAIN else (1, 2):
                name = f"{kind}-{ranks}"
                Path(scratch, name).mkdir()
                outcomes[name] = run(_save, ranks, str(Path(scratch, name)), kind)[0]
        with tarfile.open(folder / ARCHIVE, "w:xz") as archive:
            archive.add(scratch, ".")
    (folder / NEXT).write_text(json.dumps(outcomes, indent=1) + "\n")
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give the folder of all versions: python -m support.versions tests/checkpoint/versions")
    from support import versions  # by the name under which ranks can import it

    print(versions.make(Path(sys.argv[1])))
