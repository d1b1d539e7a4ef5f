"""A checkpoint resumes in any layout on any number of ranks, equal to the rounding of the reductions."""

from __future__ import annotations

import functools
import tempfile

import pytest
import torch

from manic.testing import run
from support.runs import Run

SOME = [
    ("single", 1),
    ("ddp", 2),
    ("fsdp2", 2),
    ("fsdp2", 3),
    ("hsdp", 4),
    ("tp+fsdp2", 4),
    ("zero1", 3),
    ("fsdp1-orig", 2),
]
ALL = [
    *SOME, ("ddp", 3), ("fsdp2", 1), ("fsdp2", 4), ("hsdp", 2), ("tp", 2), ("zero1", 1),
    ("fsdp1-flat", 4),
]  # fmt: skip
BEFORE, AFTER = 6, 20

Trained = tuple[list[float], dict[str, torch.Tensor]]


def train_and_save(layout: str, directory: str, variant: str) -> Trained:
    started = Run(layout, "adamw", directory, noise=False, setting={"variant": variant})
    started.train(BEFORE)
    started.checkpointer.save(BEFORE)
    return started.train(AFTER), started.setup.gather()


def load_and_train(layout: str, directory: str, variant: str) -> Trained:
    resumed = Run(layout, "adamw", directory, noise=False, setting={"variant": variant})
    if layout in ("ddp", "zero1"):  # DDP's first backward sums in another order than later ones
        resumed.backward()
    resumed.checkpointer.load()
    return resumed.train(AFTER), resumed.setup.gather()


def load_each(layout: str, sources: dict[tuple[str, int], tuple[str, Trained]], world_size: int, variant: str) -> None:
    for source, (directory, (scales, parameters)) in sources.items():
        found, gathered = load_and_train(layout, directory, variant)
        if source == (layout, world_size):
            assert found == scales
            assert all(torch.equal(gathered[name], value) for name, value in parameters.items())
        assert found == pytest.approx(scales, rel=1e-9), source
        for name, value in parameters.items():
            torch.testing.assert_close(gathered[name], value, rtol=1e-9, atol=1e-9, msg=f"{source}: {name}")


@functools.cache
def saved(layout: str, world_size: int, variant: str) -> tuple[tempfile.TemporaryDirectory[str], Trained]:
    """A checkpoint of this layout, and the result of the uninterrupted run; cached."""
    folder = tempfile.TemporaryDirectory(prefix="manic-reshard-")
    return folder, run(train_and_save, world_size, layout, folder.name, variant)[0]


def load_all(sources: list[tuple[str, int]], layout: str, world_size: int, variant: str = "optax") -> None:
    found = {source: (saved(*source, variant)[0].name, saved(*source, variant)[1]) for source in sources}
    run(load_each, world_size, layout, found, world_size, variant, timeout=400)


@pytest.mark.parametrize(("layout", "world_size"), SOME)
def test_resumes_from_other_layouts(layout: str, world_size: int) -> None:
    load_all(SOME, layout, world_size)


@pytest.mark.parametrize(("layout", "world_size"), SOME[1:3])
def test_reshards_the_multiplicative_variant(layout: str, world_size: int) -> None:
    load_all(SOME, layout, world_size, "multiplicative")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("layout", "world_size"), ALL)
def test_resumes_from_every_layout(layout: str, world_size: int) -> None:
    load_all(ALL, layout, world_size)
