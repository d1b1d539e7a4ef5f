"""A tuner that was loaded without the x_ref that it belongs to is refused at the first step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist

from manic import Mechanic
from manic.testing import run
from manic.tuners.registry import TUNERS
from support.problems import problem
from support.training import train


def without_x_ref(saved: dict[str, Any]) -> dict[str, Any]:
    state = {
        key: {name: value for name, value in each.items() if not name.startswith("mechanic")}
        for key, each in saved["state"].items()
    }
    return {**saved, "state": state}


@pytest.mark.parametrize("variant", TUNERS)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_refuses_a_tuner_that_was_loaded_without_any_x_ref(base: Any, variant: str) -> None:
    def new() -> tuple[list[torch.Tensor], Any, Mechanic]:
        parameters, loss = problem()
        return parameters, loss, Mechanic(base(parameters, lr=1.0), variant=variant, s_init=1e-3)

    started, loss, optimizer = new()
    train(optimizer, loss, 3)
    saved = without_x_ref(optimizer.state_dict())
    for steps in (0, 2):
        parameters, loss, resumed = new()
        train(resumed, loss, steps)
        for parameter, value in zip(parameters, started):
            parameter.data.copy_(value)
        resumed.load_state_dict(copy.deepcopy(saved))
        for _ in range(2):
            with pytest.raises(ValueError, match="has made 3 updates, but no rank has an x_ref of any parameter"):
                train(resumed, loss, 1)
            assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, started))
        resumed.rebase()
        train(resumed, loss, 1)

    of_the_base = copy.deepcopy(saved)
    for group in of_the_base["param_groups"]:
        del group["mechanic"]
    _, loss, resumed = new()
    resumed.load_state_dict(of_the_base)
    train(resumed, loss, 1)


def load_without_x_ref(holders: list[int]) -> None:
    """Each rank has another parameter, as under ZeRO."""
    rank = dist.get_rank()
    parameter = torch.full((3,), 1.0 + rank, requires_grad=True)

    def new() -> Mechanic:
        return Mechanic(torch.optim.SGD([parameter], lr=1.0), variant="optax", plain="sharded")

    optimizer = new()
    parameter.grad = torch.ones(3)
    optimizer.step()
    saved = optimizer.state_dict()
    resumed = new()
    resumed.load_state_dict(saved if rank in holders else without_x_ref(saved))
    if holders:
        resumed.step()
        return
    with pytest.raises(ValueError, match="no rank has an x_ref of any parameter"):
        resumed.step()


@pytest.mark.parametrize("holders", [[], [1]])
def test_refuses_a_tuner_without_any_x_ref_on_every_rank(holders: list[int]) -> None:
    run(load_without_x_ref, 2, holders)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1.0)


def adagrad(parameters: Any) -> torch.optim.Optimizer:
    """Has a state of every parameter from the beginning."""
    return torch.optim.Adagrad(parameters, lr=1.0)


def two_parameters() -> list[torch.Tensor]:
    return [torch.tensor([1.0, -2.0, 0.5 + number], dtype=torch.float64, requires_grad=True) for number in (0, 1)]


def step(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor], steps: int = 1) -> None:
    """Of the parameters given; others have no gradient."""
    for _ in range(steps):
        optimizer.zero_grad()
        for parameter in parameters:
            parameter.grad = parameter.detach().sin()
        optimizer.step()


@pytest.mark.parametrize("variant", ["optax", "multiplicative"])
@pytest.mark.parametrize("base", [momentum, adamw, adagrad])
def test_refuses_a_tuner_that_was_loaded_without_x_ref_of_a_trained_parameter(base: Any, variant: str) -> None:
    parameters = two_parameters()
    optimizer = Mechanic(base(parameters), variant=variant, s_init=1e-2)
    step(optimizer, parameters, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1] = without_x_ref(saved)["state"][1]
    resumed = Mechanic(base(parameters), variant=variant, s_init=1e-2)
    resumed.load_state_dict(saved)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no x_ref of 1 parameters .* parameter 1 of group 0, shape \(3,\)"):
            step(resumed, parameters)
    resumed.rebase()
    step(resumed, parameters, 2)


@pytest.mark.parametrize("variant", ["optax", "multiplicative"])
@pytest.mark.parametrize(("base", "took_over"), [
    (torch.optim.SGD, False), (momentum, False), (adamw, False), (adagrad, False),
    (torch.optim.SGD, True), (adamw, True), (adagrad, True),
])  # fmt: skip
def test_goes_on_where_a_parameter_has_had_no_gradient(base: Any, took_over: bool, variant: str) -> None:
    """Also where the base optimizer has trained the parameter alone, before Mechanic took over."""
    runs = []
    for is_interrupted in (False, True):
        parameters = two_parameters()
        alone = base(parameters)
        if took_over:
            alone.param_groups[0]["lr"] = 0.01
            step(alone, parameters, 3)
            alone.param_groups[0]["lr"] = 1.0
        optimizer = Mechanic(alone, variant=variant, s_init=1e-2)
        step(optimizer, parameters[:1], 4)
        if is_interrupted:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = Mechanic(base(parameters), variant=variant, s_init=1e-2)
            optimizer.load_state_dict(saved)
        step(optimizer, parameters, 2)
        runs.append((float(optimizer.scale), *(parameter.tolist() for parameter in parameters)))
    assert runs[0] == runs[1]


def load_without_x_ref_of_one(rank_without: int) -> None:
    parameters = two_parameters()
    optimizer = Mechanic(adamw(parameters))
    step(optimizer, parameters, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    if dist.get_rank() == rank_without:
        saved["state"][1] = without_x_ref(saved)["state"][1]
    resumed = Mechanic(adamw(parameters))
    resumed.load_state_dict(saved)
    with pytest.raises(ValueError, match=f"rank {rank_without}: the loaded state has no x_ref of 1 parameters"):
        step(resumed, parameters)


def test_refuses_a_tuner_without_x_ref_of_a_parameter_on_every_rank() -> None:
    run(load_without_x_ref_of_one, 2, 1)
