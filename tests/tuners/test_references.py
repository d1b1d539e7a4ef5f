"""A tuner with several references: the scale of one process in every layout, and in checkpoints that change it."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from manic import Mechanic
from manic.checkpoint import Checkpointer
from manic.testing import run
from manic.tuners.base import Tuner
from manic.tuners.mechanic import MechanicOptax
from manic.tuners.registry import make_tuner
from support.horizons import FollowingStart, Horizons, HorizonsReference
from support.layouts import Setup, Trained, batch, full, make_base, make_net, setup, train
from support.problems import problem
from support.runs import Run
from support.snapshots import backward, differing, everything, take_steps

STEPS = 20
TUNERS: dict[str, type[Tuner]] = {"horizons": Horizons, "following start": FollowingStart}
LAYOUTS = [
    ("single", 1), ("ddp", 2), ("fsdp2", 1), ("fsdp2", 3), ("hsdp", 4), ("tp", 2), ("tp+fsdp2", 4), ("mixed", 4),
    ("fsdp1-orig", 3), ("fsdp1-flat", 2), ("fsdp1-hybrid", 4), ("zero1", 2), ("pipeline", 2),
]  # fmt: skip
RESUMED = [("fsdp2", 3), ("tp+fsdp2", 4), ("fsdp1-orig", 2), ("zero1", 2), ("single", 1)]
BEFORE, AFTER = 5, 10


@functools.cache
def expected(base: str, rates: tuple[float, ...]) -> tuple[float, dict[str, Tensor]]:
    model = make_net()
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    start = {name: parameter.detach().clone() for name, parameter in named.items()}
    reference = HorizonsReference(list(named.values()), make_base(base, named.values()), rates)
    for step in range(STEPS):
        x, y = batch(step, torch.float64)
        model.zero_grad()
        (model(x) - y).square().mean().backward()
        reference.step()
    assert max(float((p.detach() - start[name]).abs().max()) for name, p in named.items()) > 0.05
    return reference.scale, {name: p.detach() for name, p in named.items()}


def trained(layout: str, base: str, tuner: str, options: dict[str, Any]) -> Trained:
    return train(layout, base, STEPS, options={"variant": TUNERS[tuner](), **options})


def assert_is_expected(layout: str, world_size: int, base: str, tuner: str, **options: Any) -> None:
    scale, parameters = expected(base, TUNERS[tuner].references)
    for found in run(trained, world_size, layout, base, tuner, options):
        assert found.scale == pytest.approx(scale, rel=1e-10)
        for name, value in parameters.items():
            torch.testing.assert_close(found.parameters[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS)
def test_equals_a_single_process_in_plain_loops(layout: str, world_size: int) -> None:
    assert_is_expected(layout, world_size, "adamw", "horizons")


@pytest.mark.parametrize("options", [
    {"store_delta": True}, {"store_delta": False}, {"nonfinite": "ignore"}, {"update": "snapshot"},
    {"store_delta": True, "nonfinite": "ignore"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("base", ["sgd", "asgd"])
def test_options(base: str, tuner: str, options: dict[str, Any]) -> None:
    if base == "asgd" and "update" in options:
        pytest.skip("takes a snapshot anyway")
    assert_is_expected("single", 1, base, tuner, **options)
    assert_is_expected("fsdp2", 3, base, tuner, **options)


def train_and_save(layout: str, directory: str) -> tuple[list[float], dict[str, Tensor]]:
    started = Run(layout, "adamw", directory, noise=False, setting={"variant": Horizons(), "s_init": None})
    started.train(BEFORE)
    started.checkpointer.save(BEFORE)
    return started.train(AFTER), started.setup.gather()


def load_and_train(layout: str, directory: str) -> tuple[list[float], dict[str, Tensor]]:
    resumed = Run(layout, "adamw", directory, noise=False, setting={"variant": Horizons(), "s_init": None})
    if layout == "zero1":  # DDP's first backward sums in another order than later ones
        resumed.backward()
    resumed.checkpointer.load()
    return resumed.train(AFTER), resumed.setup.gather()


@pytest.mark.parametrize("source", [("fsdp2", 3), ("fsdp1-orig", 2), ("zero1", 2), ("tp+fsdp2", 4)], ids=str)
def test_resumes_bit_for_bit_and_on_other_shards(source: tuple[str, int]) -> None:
    with tempfile.TemporaryDirectory(prefix="manic-references-") as directory:
        scales, parameters = run(train_and_save, source[1], source[0], directory)[0]
        for layout, world_size in RESUMED:
            found, gathered = run(load_and_train, world_size, layout, directory)[0]
            if (layout, world_size) == source:
                assert found == scales
                assert all(torch.equal(gathered[name], value) for name, value in parameters.items())
            assert found == pytest.approx(scales, rel=1e-9), layout
            for name, value in parameters.items():
                torch.testing.assert_close(gathered[name], value, rtol=1e-9, atol=1e-9, msg=f"{layout}: {name}")


def resume_in_low_precision(layout: str, directory: str) -> list[str]:
    def started() -> Setup:
        return setup(layout, "adamw", torch.bfloat16, variant=Horizons())

    run_, resumed = started(), started()
    take_steps(run_, 0, BEFORE, torch.bfloat16)
    Checkpointer(directory, run_.model, run_.optimizer).save(BEFORE)
    if layout == "zero1":
        backward(resumed, 0, torch.bfloat16)
    Checkpointer(directory, resumed.model, resumed.optimizer).load()
    different = differing(everything(run_), everything(resumed))
    for each in (run_, resumed):
        take_steps(each, BEFORE, 3, torch.bfloat16)
    dtypes = {key: value.dtype for key, value in everything(resumed).items() if "mechanic_x_ref" in key}
    assert {key.split()[0]: dtype for key, dtype in dtypes.items()} in (
        {}, {"mechanic_x_ref": torch.bfloat16, "mechanic_x_ref_1": torch.float32, "mechanic_x_ref_2": torch.float32},
    )  # fmt: skip
    return different + differing(everything(run_), everything(resumed))


@pytest.mark.parametrize(("layout", "world_size"), [("fsdp2", 3), ("fsdp1-flat", 2), ("zero1", 2)])
def test_resumes_bit_for_bit_in_low_precision(layout: str, world_size: int, tmp_path: Path) -> None:
    assert run(resume_in_low_precision, world_size, layout, str(tmp_path)) == [[]] * world_size


def one_step(tuner: Tuner) -> Any:
    prepared = setup("single", "adamw", torch.float64, variant=tuner)
    for p in prepared.model.parameters():
        p.grad = torch.ones_like(full(p)) if p.requires_grad else None
    prepared.optimizer.step()
    return prepared


def test_a_checkpoint_of_other_references_is_refused(tmp_path: Path) -> None:
    saved = one_step(Horizons())
    other = one_step(type("Horizons", (Horizons,), {"references": (0.0, 2.0, 4.0)})())
    Checkpointer(tmp_path, saved.model, saved.optimizer).save(1)
    with pytest.raises(ValueError, match=r"the saved tuner is of variant .*, this one horizons"):
        Checkpointer(tmp_path, other.model, other.optimizer).load()
    with pytest.raises(ValueError, match=r"the saved tuner is of variant .*, this one horizons"):
        other.optimizer.load_state_dict(saved.optimizer.state_dict())


@pytest.mark.parametrize("missing", ["mechanic_x_ref", "mechanic_x_ref_2"])
def test_a_state_without_a_reference_is_refused(missing: str) -> None:
    saved, other = one_step(Horizons()), one_step(Horizons())
    state_dict = saved.optimizer.state_dict()
    state_dict["state"] = {key: dict(value) for key, value in state_dict["state"].items()}
    del state_dict["state"][1][missing]
    other.optimizer.load_state_dict(state_dict)
    with pytest.raises(ValueError, match=f"no {missing.removeprefix('mechanic_')} of 1 parameters .* parameter 1 of"):
        other.optimizer.step()
    other.optimizer.rebase()
    other.optimizer.step()


def test_a_single_fixed_reference_is_no_part_of_a_tag() -> None:
    """Checkpoints of tuners that declare none stay loadable."""
    assert make_tuner("optax").tag == type("Same", (MechanicOptax,), {"references": (0,)})().tag == 8808251
    assert make_tuner("optax").tag != type("Other", (MechanicOptax,), {"references": (1.0,)})().tag


@pytest.mark.parametrize(("changes", "message"), [
    ({"scales": "displacement"}, "references .* need scales='updates'"),
    ({"scales": "displacement", "references": (2.0,), "sums": ("grad_square",)}, "need scales='updates'"),
    ({"references": (0.0, 2.0)}, "sums must be among .* got .*delta_grad_2"),
    ({"references": ()}, "references must be 1 to 8"),
    ({"references": (0.0,) * 9}, "references must be 1 to 8"),
    ({"references": (0.0, 1.0, -1.0)}, "finite numbers that are not negative"),
    ({"references": (0.0, 1.0, float("nan"))}, "finite numbers that are not negative"),
])  # fmt: skip
def test_declarations_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mechanic(torch.optim.SGD(problem()[0], lr=1.0), variant=type("Other", (Horizons,), changes)())
