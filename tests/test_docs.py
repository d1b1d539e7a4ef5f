"""Every Python block in the README and the docs runs on two ranks, and its optimizer trains.

Those of the pages about frameworks are run in tests/integrations/test_page.py, where the frameworks are.
"""

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
from support import fault_cases, frameworks, lost_rank_cases

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(page.relative_to(ROOT)): page for page in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]}
WORDS = 1200


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


# The blocks about frameworks need their packages: tests/integrations runs them.
BLOCKS = [
    (name, index)
    for name, page in PAGES.items()
    if not page.name.startswith("frameworks")
    for index in range(len(blocks(page)))
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
            "manic": manic, "Mechanic": manic.Mechanic, "mechanize": manic.mechanize, "fully_shard": fully_shard,
            "mesh": init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp")), "init_device_mesh": init_device_mesh,
            "parallelize_module": parallelize_module, "ColwiseParallel": ColwiseParallel,
            "RowwiseParallel": RowwiseParallel, "ZeroRedundancyOptimizer": ZeroRedundancyOptimizer,
            "DistributedDataParallel": DistributedDataParallel, "FullyShardedDataParallel": FullyShardedDataParallel,
        }  # fmt: skip
        if dist.get_rank() == 0:
            leave_a_run_of_mechanic_pytorch()
        dist.barrier()
        exec(compile(blocks(PAGES[page])[index], f"{page} block {index}", "exec"), names)
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


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES.keys())
def test_names_are_imported_where_a_page_first_uses_them(page: Path) -> None:
    for name in ("torch", "manic", "Mechanic", "Checkpointer", "fully_shard", "init_device_mesh", "dcp"):
        import_of_it = rf"^(import (.* as )?{name}$|from \S+ import (.*\W)?{name}\b)"
        read = ""
        for block in blocks(page):
            read += block
            code = re.sub(r"#.*", "", re.sub(r"^\s*(import|from) .*", "", block, flags=re.MULTILINE))
            if re.search(rf"(?<![\w.\"'/]){name}[.(]", code):
                assert re.search(import_of_it, read, re.MULTILINE), f"{name} in:\n{block}"
                break


def test_the_sample_of_inspect_has_the_rows_of_the_default_tuner() -> None:
    sample = (DOCS / "checkpoints.md").read_text()
    rows = re.findall(r"^ {17}(\w+) +[-\d.e]+$", sample, re.MULTILINE)
    assert tuple(rows) == multiplicative.Multiplicative.fields


def test_page_of_faults_counts_the_tests() -> None:
    rows = [line.split("|") for line in (DOCS / "appendix" / "faults.md").read_text().splitlines()]
    counts = {row[1].split(":")[0].strip(): (row[2].strip(), row[3].strip()) for row in rows if len(row) == 6}
    tried, quick = fault_cases.tried(), fault_cases.tried(quick=True)
    assert counts["a gradient that is nan or infinite"] == (str(tried["gradients"]), str(quick["gradients"]))
    assert counts["an error on one rank in the middle of a step"] == (str(tried["errors"]), str(quick["errors"]))
    of_ranks = (str(len(lost_rank_cases.MATRIX)), str(len(lost_rank_cases.SHORT)))
    assert counts["a rank that is killed, exits, raises or hangs"] == of_ranks


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES.keys())
def test_links_have_targets(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", prose(page)):
        if not target.startswith("https://"):
            path = page.parent / target if target else page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_page_is_short(page: Path) -> None:
    words = [word for word in prose(page).split() if re.search(r"\w", word)]
    assert len(words) <= WORDS, f"{len(words)} words: move measurements and histories to docs/appendix"


def test_page_of_the_default_tuner_has_its_constants() -> None:
    text = (DOCS / "multiplicative.md").read_text()
    rows = re.findall(r"^\| (`[A-Z_`, ]+`) \| ([0-9., ]+) \|", text, re.MULTILINE)
    told = {
        name.strip("`"): float(value)
        for names, values in rows
        for name, value in zip(names.split(", "), values.split(", "))
    }
    assert len(told) == 12
    assert told == {name: getattr(multiplicative, f"_{name}") for name in told}


def test_frameworks_page_has_the_promises_of_the_tests() -> None:
    promised = {(each.framework, each.what): each.limit for each in frameworks.promises()}
    found = {(row.framework, row.what): row.outcome for row in frameworks.read()}
    assert found.keys() == promised.keys(), "run pytest tests/integrations --write-frameworks"
    for promise, outcome in found.items():
        limit = promised[promise]
        assert outcome.startswith((f"limit: {limit}" if limit else "works", "not run: "))


def test_frameworks_table_is_written_only_after_all_tests_passed() -> None:
    first = frameworks.Promise("test_a.py::test_first", "pytest", "does this", None)
    second = frameworks.Promise("test_b.py::test_second", "nothing", "does that", "refused")
    passed = {"test_a.py::test_first": [("passed", ""), ("passed", "")]}
    works, limit = frameworks.rows_of([first, second], {**passed, "test_b.py::test_second": [("passed", "")]})[::-1]
    assert (works.version, works.outcome) == (pytest.__version__, "works")
    assert (limit.version, limit.outcome) == ("none", "limit: refused")
    (row,) = frameworks.rows_of([second], {"test_b.py": [("skipped", "nothing is not installed")]})
    assert row.outcome == "not run: nothing is not installed"
    with pytest.raises(ValueError, match=r"test_second was not run"):
        frameworks.rows_of([first, second], passed)
    with pytest.raises(ValueError, match=r"test_first has failed"):
        frameworks.rows_of([first], {"test_a.py::test_first": [("passed", ""), ("failed", "")]})
