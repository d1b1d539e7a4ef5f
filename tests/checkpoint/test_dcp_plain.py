"""Torch's own checkpoint functions bring a plain run into Mechanic, and back."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from manic import Mechanic
from manic.testing import run
from support.layouts import full
from support.torch_saving import Run, assert_identical, plain


def become_mechanic(layout: str, saving: str, loading: str, into: str, directory: str) -> None:
    """Compare with the plain run, wrapped at the same step."""
    expected = Run(layout, plain)
    expected.train(4)
    saved = expected.save(saving, directory)
    state = copy.deepcopy(expected.optimizer.state_dict()["state"])
    expected.optimizer = Mechanic(expected.optimizer, s_init=1e-3, variant="optax")
    start = expected.result()
    expected.train(4)

    moved = Run(layout, plain if into == "the base, before it is wrapped" else None)
    mechanic = moved.optimizer
    if into == "the base":
        moved.optimizer = mechanic.optimizers[0]
    moved.load(loading, saved)
    moved.optimizer = mechanic if isinstance(mechanic, Mechanic) else Mechanic(mechanic, s_init=1e-3, variant="optax")
    assert_identical(moved.result(), start)
    moved.train(1)
    for index, parameter in enumerate(p for group in moved.optimizer.param_groups for p in group["params"]):
        if parameter.requires_grad:
            assert moved.optimizer.state[parameter]["step"] == state[index]["step"] + 1
            assert torch.equal(full(moved.optimizer.state[parameter]["mechanic_x_ref"]), start[1][index])
    moved.train(3)
    assert_identical(moved.result(), expected.result())


PLAIN_INTO_MECHANIC = [
    ("flat files", "flat files", "the base, before it is wrapped"),
    ("flat files", "flat files, in part", "the base"),
    ("flat files", "flat files, in part", "Mechanic"),
    ("files", "files, in part", "Mechanic"),
    ("nested", "nested", "Mechanic"),
    ("full", "full", "Mechanic"),
    ("gathered on one rank", "gathered on one rank", "Mechanic"),
]


@pytest.mark.parametrize(("saving", "loading", "into"), PLAIN_INTO_MECHANIC)
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_loads_plain_adamw_into_mechanic_with_a_new_tuner(
    layout: str, saving: str, loading: str, into: str, tmp_path: Path
) -> None:
    run(become_mechanic, 2, layout, saving, loading, into, str(tmp_path))


def become_mechanic_late(layout: str, saving: str, loading: str, into: str, directory: str) -> None:
    """Torch's functions load a Mechanic's current state back into it where the checkpoint has none."""
    left = Run(layout, plain)
    left.train(4)
    saved = left.save(saving, directory)
    moved = Run(layout)
    moved.train(2)
    mechanic = moved.optimizer
    if into == "the base":
        moved.optimizer = mechanic.optimizers[0]
    moved.load(loading, saved)
    moved.optimizer = mechanic
    started = mechanic.scale.item() == pytest.approx(6e-3)
    before = moved.result()[1]
    if not started:
        with pytest.raises(ValueError, match="not where the loaded optimizer state says"):
            moved.train(1)
        assert_identical((0.0, moved.result()[1]), (0.0, before))
        mechanic.rebase()
    moved.train(1)
    references = [mechanic.state[p]["mechanic_x_ref"] for p in moved.model.parameters() if p in mechanic.state]
    trained = [x for x, p in zip(before, moved.model.parameters(), strict=True) if p in mechanic.state]
    assert_identical((0.0, [full(reference) for reference in references]), (0.0, trained))


@pytest.mark.parametrize(("saving", "loading", "into"), [
    combination for combination in PLAIN_INTO_MECHANIC if "before" not in combination[2]
])  # fmt: skip
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_loading_plain_adamw_after_steps_resets_the_tuner_or_refuses(
    layout: str, saving: str, loading: str, into: str, tmp_path: Path
) -> None:
    run(become_mechanic_late, 2, layout, saving, loading, into, str(tmp_path))


def load_strictly(layout: str, directory: str) -> None:
    started = Run(layout, plain)
    started.train(2)
    saved = started.save("flat files", directory)
    refusing = Run(layout)
    before = refusing.result()
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: .*mechanic"):
        refusing.load("flat files", saved)
    assert_identical(refusing.result(), before)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_refuses_a_checkpoint_without_a_tuner_by_default(layout: str, tmp_path: Path) -> None:
    run(load_strictly, 2, layout, str(tmp_path))


def become_plain(layout: str, mechanism: str, directory: str) -> None:
    """Compare with the base optimizer, unwrapped at the same step."""
    expected = Run(layout)
    expected.train(4)
    saved = expected.save(mechanism, directory)
    scale = expected.result()[0]
    expected.optimizer = expected.optimizer.optimizers[0]
    moved = Run(layout, plain)
    moved.load(mechanism, saved)
    for each in (expected, moved):
        for group in each.optimizer.param_groups:
            group["lr"] *= scale
        each.train(4)
    assert_identical(moved.result(), expected.result())


@pytest.mark.parametrize("mechanism", ["flat files", "nested", "flat", "full", "gathered on one rank"])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_loads_mechanic_into_plain_adamw_with_its_moments(layout: str, mechanism: str, tmp_path: Path) -> None:
    run(become_plain, 2, layout, mechanism, str(tmp_path))
