"""With a scale per group, each group keeps its column of the tuner's state as groups come, go and are loaded."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from manic import Mechanic
from support.problems import problem


def take_steps(optimizer: Mechanic, parameters: list[Tensor], loss: Callable[[int], Tensor], steps: range) -> list[Any]:
    scales = []
    for step in steps:
        for parameter in parameters:
            parameter.grad = None
        loss(step).backward()
        optimizer.step()
        scales.append(optimizer.scale.tolist())
    return scales


def of_two_groups(**options: Any) -> tuple[list[Tensor], Callable[[int], Tensor], Mechanic]:
    parameters, loss = problem()
    base = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(parameters, (1.0, 0.1))], lr=1.0, momentum=0.9)
    return parameters, loss, Mechanic(base, **{"scale": "per group", **options})


@pytest.mark.parametrize("on_base", [False, True])
@pytest.mark.parametrize("nonfinite", ["raise", "ignore"])
def test_an_added_group_begins_at_zero(nonfinite: Any, on_base: bool) -> None:
    parameters, loss = problem()
    optimizer = Mechanic(torch.optim.SGD(parameters[1:], lr=1.0), scale="per group", nonfinite=nonfinite)
    before = take_steps(optimizer, parameters, loss, range(5))[-1]
    (optimizer.optimizers[0] if on_base else optimizer).add_param_group({"params": parameters[:1]})
    assert optimizer.scale.tolist() == [before[0], 0.0]
    assert torch.isnan(optimizer.metrics()["h/1"])
    state = optimizer.state_dict()
    assert [group["mechanic"].shape[1] for group in state["param_groups"]] == [1, 1]
    scales = take_steps(optimizer, parameters, loss, range(5, 15))
    assert 0.0 < scales[0][1] < scales[-1][1]
    parameters_, loss_ = problem()
    other = Mechanic(
        torch.optim.SGD([{"params": [p]} for p in parameters_[::-1]], lr=1.0), scale="per group", nonfinite=nonfinite
    )
    for theirs, mine in zip(parameters_, parameters):
        theirs.data.copy_(mine)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = take_steps(optimizer, parameters, loss, range(15, 20))
    assert take_steps(other, parameters_, loss_, range(15, 20)) == expected


def test_columns_follow_groups_that_are_removed_moved_and_returned() -> None:
    parameters, loss, optimizer = of_two_groups()
    first, second = take_steps(optimizer, parameters, loss, range(5))[-1]
    base = optimizer.optimizers[0]
    base.param_groups.reverse()
    assert optimizer.scale.tolist() == [second, first]
    away = base.param_groups.pop()
    assert optimizer.scale.tolist() == [second]
    optimizer.param_groups = [away, *base.param_groups]
    assert optimizer.scale.tolist() == [first, second]
    assert all(a > b for a, b in zip(take_steps(optimizer, parameters, loss, range(5, 10))[-1], (first, second)))


def test_a_group_made_of_anothers_settings_has_a_column_of_its_own() -> None:
    parameters, loss = problem()
    optimizer = Mechanic(torch.optim.SGD(parameters[:1], lr=1.0), scale="per group")
    scale = take_steps(optimizer, parameters, loss, range(5))[-1]
    optimizer.add_param_group({**optimizer.param_groups[0], "params": parameters[1:]})
    assert optimizer.scale.tolist() == [*scale, 0.0]
    take_steps(optimizer, parameters, loss, range(5, 8))
    assert len(set(optimizer.scale.tolist())) == 2


@pytest.mark.parametrize("how", ["wrapper", "bases", "pickled", "deepcopy"])
def test_resumes_bit_for_bit(how: str) -> None:
    def make() -> tuple[list[Tensor], Callable[[int], Tensor], Mechanic]:
        parameters, loss = problem()
        bases = [torch.optim.AdamW(parameters[:1], lr=1.0), torch.optim.SGD(parameters[1:], lr=0.5, momentum=0.9)]
        return parameters, loss, Mechanic(bases, scale="per group")

    parameters, loss, optimizer = make()
    take_steps(optimizer, parameters, loss, range(7))
    mine, my_loss, resumed = make()
    if how in ("wrapper", "bases"):
        for p, q in zip(mine, parameters):
            p.data.copy_(q)
    if how == "wrapper":
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif how == "bases":
        for base, theirs in zip(resumed.optimizers, optimizer.optimizers):
            base.load_state_dict(copy.deepcopy(theirs.state_dict()))
            assert resumed.scale.shape == (2,)
    else:
        resumed = pickle.loads(pickle.dumps(optimizer)) if how == "pickled" else copy.deepcopy(optimizer)
        copies = [p for group in resumed.param_groups for p in group["params"]]
        for step in range(7, 12):
            for p in parameters:
                p.grad = None
            loss(step).backward()
            for p, q in zip(copies, parameters):
                p.grad = None if q.grad is None else q.grad.clone()
            optimizer.step()
            resumed.step()
            assert torch.equal(resumed.scale, optimizer.scale)
            assert all(torch.equal(p, q) for p, q in zip(copies, parameters))
        return
    assert torch.equal(resumed.scale, optimizer.scale)
    expected = take_steps(optimizer, parameters, loss, range(7, 12))
    assert take_steps(resumed, mine, my_loss, range(7, 12)) == expected
    assert all(torch.equal(p, q) for p, q in zip(mine, parameters))


def test_a_state_dict_of_the_base_alone_resets_every_column() -> None:
    parameters, loss, optimizer = of_two_groups()
    take_steps(optimizer, parameters, loss, range(5))
    plain = torch.optim.SGD([{"params": [p]} for p in problem()[0]], lr=1.0, momentum=0.9)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.scale.tolist() == [0.0, 0.0]
    assert all(scale > 0 for scale in take_steps(optimizer, parameters, loss, range(3))[-1])


def test_a_step_that_fails_leaves_every_column() -> None:
    parameters, loss, optimizer = of_two_groups()
    take_steps(optimizer, parameters, loss, range(5))
    before = [group["mechanic"].clone() for group in optimizer.param_groups]

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    handle = optimizer.optimizers[0].register_step_post_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        take_steps(optimizer, parameters, loss, range(5, 6))
    assert all(torch.equal(group["mechanic"], each) for group, each in zip(optimizer.param_groups, before))
    handle.remove()
    take_steps(optimizer, parameters, loss, range(5, 6))
