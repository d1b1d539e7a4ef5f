"""A checkpoint of any layout on any number of ranks is the same run in any other, to the rounding of the reductions."""

from __future__ import annotations

import functools
import tempfile

import pytest
import torch

from manic.testing import run
from runs import Run

LAYOUTS = [
    ("single", 1), ("ddp", 2), ("ddp", 3), ("fsdp2", 1), ("fsdp2", 2), ("fsdp2", 3), ("fsdp2", 4), ("hsdp", 2),
    ("hsdp", 4), ("tp", 2), ("tp+fsdp2", 4), ("zero1", 1), ("zero1", 3), ("fsdp1-orig", 2), ("fsdp1-flat", 4),
]  # fmt: skip
BEFORE, AFTER = 6, 20

Trained = tuple[list[float], dict[str, torch.Tensor]]


def train_and_save(layout: str, directory: str) -> Trained:
    started = Run(layout, "adamw", directory, noise=False)
    started.train(BEFORE)
    started.checkpointer.save(BEFORE)
    return started.train(AFTER), started.setup.gather()


def load_and_train(layout: str, directory: str) -> Trained:
    resumed = Run(layout, "adamw", directory, noise=False)
    if layout in ("ddp", "zero1"):  # DDP's first backward sums in another order than all later ones
        resumed.rehearse()
    resumed.checkpointer.load()
    return resumed.train(AFTER), resumed.setup.gather()


@functools.cache
def saved(layout: str, world_size: int) -> tuple[tempfile.TemporaryDirectory[str], Trained]:
    """A checkpoint of this layout, and what became of the run that went on; made once."""
    directory = tempfile.TemporaryDirectory(prefix="manic-reshard-")
    return directory, run(train_and_save, world_size, layout, directory.name)[0]


@pytest.mark.parametrize("target", LAYOUTS, ids=lambda pair: f"to {pair[0]} {pair[1]}")
@pytest.mark.parametrize("source", LAYOUTS, ids=lambda pair: f"{pair[0]} {pair[1]}")
def test_a_checkpoint_goes_on_in_any_layout(source: tuple[str, int], target: tuple[str, int]) -> None:
    directory, (scales, parameters) = saved(*source)
    for found, gathered in run(load_and_train, target[1], target[0], directory.name):
        if source == target:
            assert found == scales
        assert found == pytest.approx(scales, rel=1e-9)
        for name, value in parameters.items():
            torch.testing.assert_close(gathered[name], value, rtol=1e-9, atol=1e-9)
