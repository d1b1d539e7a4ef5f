"""Every Python block in the README and the docs runs on two ranks, and its optimizer trains."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import manic
from manic.testing import run
from manic.tuners import multiplicative
from support import fault_cases, lost_rank_cases

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


BLOCKS = [
    (page.name, index) for page in PAGES if not page.name.startswith("frameworks") for index in range(len(blocks(page)))
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def leave_a_run_of_mechanic_pytorch() -> None:
    from mechanic_pytorch import mechanize

    model = Net()
    optimizer = mechanize(torch.optim.AdamW)(model.parameters(), lr=1.0)
    model(torch.ones(3, 4)).square().mean().backward()
    optimizer.step()
    torch.set_grad_enabled(True)
    torch.save(optimizer.state_dict(), "optimizer.pt")


def execute(page: str, index: int) -> None:
    """Run a block with the names that the docs assume."""
    box = [tempfile.mkdtemp()]
    dist.broadcast_object_list(box)
    here = Path.cwd()
    os.chdir(box[0])
    try:
        model = Net()
        optimizer = manic.Mechanic(torch.optim.AdamW(model.parameters(), lr=1.0))
        names: dict[str, Any] = {
            "__name__": "block", "torch": torch, "model": model, "optimizer": optimizer, "steps": 10, "step": 3,
            "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10), "world_size": 2,
            "batches": [(torch.randn(3, 4), torch.randn(3, 2)) for _ in range(3)],
            "Mechanic": manic.Mechanic, "mechanize": manic.mechanize, "fully_shard": fully_shard,
            "mesh": init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp")), "init_device_mesh": init_device_mesh,
            "parallelize_module": parallelize_module, "ColwiseParallel": ColwiseParallel,
            "RowwiseParallel": RowwiseParallel, "ZeroRedundancyOptimizer": ZeroRedundancyOptimizer,
            "DistributedDataParallel": DistributedDataParallel, "FullyShardedDataParallel": FullyShardedDataParallel,
        }  # fmt: skip
        if dist.get_rank() == 0:
            leave_a_run_of_mechanic_pytorch()
        dist.barrier()
        paths = {page.name: page for page in PAGES}
        exec(compile(blocks(paths[page])[index], f"{page} block {index}", "exec"), names)
        for name, thing in list(names.items()):
            if name.startswith("test_"):
                thing.__manic_on_each_rank__()
        for _ in range(2):
            names["optimizer"].zero_grad()
            names["model"](torch.ones(3, 4)).square().mean().backward()
            names["optimizer"].step()
        scale = getattr(names["optimizer"], "optim", names["optimizer"]).scale
        assert bool((scale > 0).all())
    finally:
        os.chdir(here)


@pytest.mark.parametrize(("page", "index"), BLOCKS)
def test_block_runs(page: str, index: int) -> None:
    run(execute, 2, page, index)


def test_reliability_page_counts_the_tests() -> None:
    rows = [line.split("|") for line in (ROOT / "docs" / "reliability.md").read_text().splitlines()]
    counts = {row[1].split(":")[0].strip(): (row[2].strip(), row[3].strip()) for row in rows if len(row) == 6}
    tried, quick = fault_cases.tried(), fault_cases.tried(quick=True)
    assert counts["a gradient that is nan or infinite"] == (str(tried["gradients"]), str(quick["gradients"]))
    assert counts["an error on one rank in the middle of a step"] == (str(tried["errors"]), str(quick["errors"]))
    of_ranks = (str(len(lost_rank_cases.MATRIX)), str(len(lost_rank_cases.SHORT)))
    assert counts["a rank that is killed, exits, raises or hangs"] == of_ranks


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_have_targets(page: Path) -> None:
    text = re.sub(r"```text\n.*?```", "", page.read_text(), flags=re.DOTALL)  # output, of which nothing is a link
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_variants_page_has_the_constants_of_the_default_tuner() -> None:
    rows = re.findall(
        r"^\| (`[A-Z_`, ]+`) \| ([0-9., ]+) \|", (ROOT / "docs" / "variants.md").read_text(), re.MULTILINE
    )
    told = {
        name.strip("`"): float(value)
        for names, values in rows
        for name, value in zip(names.split(", "), values.split(", "))
    }
    assert len(told) == 12
    assert told == {name: getattr(multiplicative, f"_{name}") for name in told}
