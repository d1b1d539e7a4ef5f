"""A tuner that was loaded without the x_ref that it belongs to is refused at the first step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist

from manic import Mechanic
from manic.testing import run
from support.problems import problem
from support.training import train


def without_x_ref(saved: dict[str, Any]) -> dict[str, Any]:
    state = {
        key: {name: value for name, value in each.items() if not name.startswith("mechanic")}
        for key, each in saved["state"].items()
    }
    return {**saved, "state": state}


@pytest.mark.parametrize("variant", ["optax", "multiplicative", "pytorch"])
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
