"""A resumed run equals an uninterrupted one bit for bit; checkpoints are kept and refused as documented."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from manic import Mechanic
from manic.checkpoint import Checkpointer, DamagedCheckpointError
from manic.testing import ranks, run
from support.bucket import Bucket  # registers bucket://
from support.runs import Run, assert_identical

LAYOUTS = [
    ("single", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4), ("tp", 2), ("tp+fsdp2", 4),
    ("fsdp1-orig", 2), ("fsdp1-flat", 2), ("zero1", 2), ("zero1", 4),
]  # fmt: skip


def interrupt_and_compare(layout: str, base: str, directory: str, at: int) -> None:
    torch.manual_seed(dist.get_rank())
    uninterrupted = Run(layout, base, directory)
    uninterrupted.train(at)
    uninterrupted.checkpointer.save(at)
    uninterrupted.train(8)

    torch.manual_seed(1234)
    resumed = Run(layout, base, directory)
    resumed.train(2)  # load must discard this
    resumed.checkpointer.load()
    assert resumed.counter.step == at
    resumed.train(8)
    assert_identical(resumed.result(), uninterrupted.result())


@pytest.mark.parametrize(("layout", "world_size", "base"), [
    *((*each, "adamw") for each in LAYOUTS), ("single", 1, "sgd"), ("fsdp2", 2, "sgd"), ("tp+fsdp2", 4, "sgd"),
])  # fmt: skip
def test_resumes_bit_for_bit(layout: str, world_size: int, base: str, tmp_path: Path) -> None:
    run(interrupt_and_compare, world_size, layout, base, str(tmp_path), 6)


@pytest.mark.parametrize(("layout", "world_size"), [("single", 1), ("fsdp2", 2), ("fsdp1-flat", 2), ("zero1", 2)])
def test_resumes_from_before_the_first_step(layout: str, world_size: int, tmp_path: Path) -> None:
    run(interrupt_and_compare, world_size, layout, "adamw", str(tmp_path), 0)


@ranks(2)
def test_saves_and_loads_after_a_forward_pass_alone() -> None:
    """FSDP2 then leaves the root's parameters whole."""
    box = [tempfile.mkdtemp()]
    dist.broadcast_object_list(box)
    started = Run("fsdp2", "adamw", box[0])
    started.train(2)
    for save_or_load in (lambda: started.checkpointer.save(2), started.checkpointer.load):
        with torch.no_grad():
            started.setup.model(torch.ones(4, 6, dtype=torch.float64))
        save_or_load()
    started.train(2)


def save_each(directory: str, steps: list[int], options: dict[str, Any]) -> list[int]:
    started = Run("fsdp2", "sgd", Path(directory), **options)
    for step in steps:
        started.checkpointer.save(step)
    return started.checkpointer.steps()


@pytest.mark.parametrize(("options", "kept"), [
    ({}, [1, 2, 3, 4, 5, 6]), ({"keep_latest": 2}, [5, 6]), ({"keep_latest": 1, "keep_every": 3}, [3, 6]),
], ids=str)  # fmt: skip
def test_retention(options: dict[str, Any], kept: list[int], tmp_path: Path) -> None:
    for found in run(save_each, 2, str(tmp_path), [1, 2, 3, 4, 5, 6], options):
        assert found == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step:08d}" for step in kept]


def assert_errors(directory: str) -> None:
    started = Run("fsdp2", "sgd", Path(directory))
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        started.checkpointer.load()
    started.checkpointer.save(1)
    with pytest.raises(FileExistsError, match="never overwritten"):
        started.checkpointer.save(1)
    with pytest.raises(FileNotFoundError, match=r"is not a checkpoint.*has steps \[1\]"):
        started.checkpointer.load(2)
    before = started.result()
    for other, words in (
        (nn.Sequential(nn.Linear(2, 2)), "another model: it has no 0.weight"),
        (nn.ModuleDict({name: nn.Linear(2, 2) for name in ("up", "down", "norm", "head", "frozen")}), "has shape"),
        (nn.ModuleDict({"up": nn.Linear(6, 16)}), "this model has no down.bias"),
    ):
        optimizer = torch.optim.SGD(other.parameters(), lr=1.0)
        kept = {name: p.detach().clone() for name, p in other.named_parameters()}
        with pytest.raises(ValueError, match=words):
            Checkpointer(directory, other, optimizer).load()
        assert all(torch.equal(p, kept[name]) for name, p in other.named_parameters())
    assert_identical(started.result(), before)
    blocked = Path(directory, "a file")
    if dist.get_rank() == 0:
        blocked.write_text("")
    dist.barrier()
    with pytest.raises(OSError):
        Checkpointer(blocked, started.setup.model, started.setup.optimizer).save(1)


def test_retention_keeps_the_latest_save(tmp_path: Path) -> None:
    for found in run(save_each, 2, str(tmp_path), [200, 300, 120], {"keep_latest": 2}):
        assert found == [120, 200, 300]


def refuse_and_accept(directory: str) -> None:
    """A path as a string; other betas; a parameter without gradients; Delta stored or not."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})

    def make(base: Any = torch.optim.AdamW, **options: Any) -> tuple[Checkpointer, Mechanic]:
        optimizer = Mechanic(base(model.parameters(), lr=1.0), **{"variant": "optax", **options})
        return Checkpointer(directory, model, optimizer), optimizer

    def train(optimizer: torch.optim.Optimizer, used: str) -> None:
        model[used](torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    started, optimizer = make()
    for _ in range(3):
        train(optimizer, "used")
    path = started.save(3)
    assert path is not None
    train(optimizer, "used")  # so that the parameters differ from the checkpoint
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="other betas"):
        make(betas=(0.5, 0.6, 0.7, 0.8, 0.85, 0.95))[0].load()
    with pytest.raises(ValueError, match="of variant optax"):
        make(variant="pytorch")[0].load()
    with pytest.raises(ValueError, match=r"another optimizer.*it has no max_exp_avg_sq for used"):
        make(lambda ps, lr: torch.optim.AdamW(ps, lr=lr, amsgrad=True))[0].load()
    with pytest.raises(ValueError, match=r"another optimizer.*it has \w+ for used"):
        make(torch.optim.SGD)[0].load()
    with pytest.raises(FileNotFoundError, match="not a checkpoint"):
        make()[0].load("nowhere/at/all")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before)), "a refused load changed the model"

    for store_delta in (False, True):
        resumed, other = make(store_delta=store_delta)
        assert resumed.load(path) == path
        assert other.scale != optimizer.scale
        for used in ("used", "unused"):
            train(other, used)
        assert resumed.save(6 + store_delta) is not None
    without_delta, other = make()
    without_delta.load(6)
    train(other, "used")
    assert other.state[model["used"].weight]["mechanic_delta"].abs().sum() > 0


def test_refuses_and_accepts_loads(tmp_path: Path) -> None:
    run(refuse_and_accept, 2, str(tmp_path))


def save_to_a_bucket(url: str) -> None:
    assert Bucket.protocol == "bucket"
    interrupt_and_compare("fsdp2", "adamw", url, 6)


def test_saves_to_a_url(tmp_path: Path) -> None:
    run(save_to_a_bucket, 2, f"bucket://{tmp_path}/run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step_00000006"]
    names = {path.name for path in (tmp_path / "run" / "step_00000006").iterdir()}
    assert names == {".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json"}


def test_raises_errors_on_every_rank(tmp_path: Path) -> None:
    run(assert_errors, 2, str(tmp_path))


def test_refuses_an_unfinished_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".incomplete_step_00000009").mkdir()
    (tmp_path / "step_00000003").mkdir()
    model = nn.Linear(2, 2)
    checkpointer = Checkpointer(tmp_path, model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert checkpointer.latest() == 3
    with pytest.raises(DamagedCheckpointError, match=r"step_00000003 is incomplete: it has no manifest.json"):
        checkpointer.load()


def test_refuses_bad_arguments(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="keep_latest"):
        Checkpointer(tmp_path, model, torch.optim.SGD(model.parameters(), lr=1.0), keep_latest=0)


@ranks(2)
def test_saves_several_optimizers_of_any_class() -> None:
    import tempfile

    box = [tempfile.mkdtemp()]
    dist.broadcast_object_list(box)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizers = [torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9), torch.optim.Adam(model[1].parameters())]
    for optimizer in optimizers:
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    checkpointer = Checkpointer(box[0], model, optimizers)
    checkpointer.save(1)
    before = [p.detach().clone() for p in model.parameters()]
    momentum = optimizers[0].state[model[0].weight]["momentum_buffer"].clone()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        optimizers[0].state[model[0].weight]["momentum_buffer"].zero_()
    checkpointer.load()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    assert torch.equal(optimizers[0].state[model[0].weight]["momentum_buffer"], momentum)
