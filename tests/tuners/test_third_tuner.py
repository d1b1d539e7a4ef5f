"""A tuner that manic does not have, added as one class: sharded, saved and resharded like the others."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from manic import Mechanic
from manic.checkpoint import Checkpointer
from manic.inspect import inspect
from manic.testing import run
from manic.tuners.base import Learned, Sums, Tuner
from support.layouts import full, setup
from support.problems import problem
from support.runs import Run

STEPS = 20


class DoG(Tuner):
    """Distance over gradients (Ivgi, Hinder and Carmon, arXiv 2302.12022, equation 1): one step size for all of x.

    S is the largest |x - x_1| so far over the root of the summed |g|^2.
    """

    name = "dog"
    scales = "updates"
    sums = ("grad_square", "delta_square", "x_square")
    fields = ("s", "largest_distance", "sum_of_squares")

    def learn(self, state: Mapping[str, Tensor], sums: Sums) -> Learned:
        first = 1e-6 * (1.0 + sums["x_square"].sqrt())
        start = torch.where(state["largest_distance"] > 0, state["largest_distance"], first)
        distance = torch.maximum(start, sums["delta_square"].sqrt())
        total = state["sum_of_squares"] + sums["grad_square"]
        s = torch.where(total > 0, distance / total.sqrt(), 0.0)
        return Learned({"s": self._bounded(s), "largest_distance": distance, "sum_of_squares": total}, s[0])


def test_equals_a_separate_implementation_of_dog() -> None:
    theirs, loss = problem()
    start = [p.detach().clone() for p in theirs]
    largest, total = 1e-6 * (1.0 + sum(float(p.square().sum()) for p in start) ** 0.5), 0.0
    mine, my_loss = problem()
    optimizer = Mechanic(torch.optim.SGD(mine, lr=1.0), variant=DoG())
    for step in range(200):
        for parameters, each in ((theirs, loss), (mine, my_loss)):
            for p in parameters:
                p.grad = None
            each(step).backward()
        optimizer.step()
        with torch.no_grad():
            largest = max(largest, sum(float((p - x).square().sum()) for p, x in zip(theirs, start)) ** 0.5)
            total += sum(float(p.grad.square().sum()) for p in theirs if p.grad is not None)
            for p in theirs:
                p.sub_(largest / total**0.5 * p.grad)
        assert optimizer.scale.item() == pytest.approx(largest / total**0.5, rel=1e-10)
    for p, q in zip(mine, theirs):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-10, atol=1e-10)
    assert max(float((p.detach() - x).abs().max()) for p, x in zip(mine, start)) > 0.05


def trained(layout: str, base: str) -> tuple[float, dict[str, Tensor]]:
    started = Run(layout, base, "", noise=False, setting={"variant": DoG(), "s_init": None})
    started.train(STEPS)
    return started.result()


@functools.cache
def alone(base: str) -> tuple[float, dict[str, Tensor]]:
    return trained("single", base)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_fsdp2_equals_a_single_process(world_size: int, base: str) -> None:
    scale, parameters = alone(base)
    assert scale > 1e-3
    for found, gathered in run(trained, world_size, "fsdp2", base):
        assert found == pytest.approx(scale, rel=1e-12)
        for name, value in parameters.items():
            torch.testing.assert_close(gathered[name], value, rtol=1e-11, atol=1e-11)


def train_and_save(directory: str) -> tuple[list[float], dict[str, Tensor]]:
    started = Run("fsdp2", "adamw", directory, noise=False, setting={"variant": DoG(), "s_init": None})
    started.train(STEPS)
    started.checkpointer.save(STEPS)
    return started.train(STEPS), started.setup.gather()


def load_and_train(layout: str, directory: str) -> tuple[list[float], dict[str, Tensor]]:
    resumed = Run(layout, "adamw", directory, noise=False, setting={"variant": DoG(), "s_init": None})
    resumed.checkpointer.load()
    return resumed.train(STEPS), resumed.setup.gather()


def test_resumes_on_other_numbers_of_ranks() -> None:
    with tempfile.TemporaryDirectory(prefix="manic-dog-") as directory:
        scales, parameters = run(train_and_save, 4, directory)[0]
        for layout, world_size in (("fsdp2", 4), ("fsdp2", 2), ("fsdp2", 3), ("tp+fsdp2", 4), ("single", 1)):
            found, gathered = run(load_and_train, world_size, layout, directory)[0]
            if (layout, world_size) == ("fsdp2", 4):
                assert found == scales
                assert all(torch.equal(gathered[name], value) for name, value in parameters.items())
            assert found == pytest.approx(scales, rel=1e-9)
            for name, value in parameters.items():
                torch.testing.assert_close(gathered[name], value, rtol=1e-9, atol=1e-9)
        (tuner,) = inspect(Path(directory) / f"step_{STEPS:08}")["tuners"]
        assert tuner["variant"].startswith("unknown to this version")
        assert tuner["updates"] == STEPS


def test_refuses_the_state_of_another_tuner(tmp_path: Path) -> None:
    saved = setup("single", "adamw", torch.float64, variant=DoG())
    other = setup("single", "adamw", torch.float64, variant="optax")
    for prepared in (saved, other):
        for p in prepared.model.parameters():
            p.grad = torch.ones_like(full(p)) if p.requires_grad else None
        prepared.optimizer.step()
    Checkpointer(tmp_path, saved.model, saved.optimizer).save(1)
    with pytest.raises(ValueError, match="of variant unknown to this version"):
        Checkpointer(tmp_path, other.model, other.optimizer).load()
