"""What users write to an optimizer arrives in the base optimizers, or is refused."""

from __future__ import annotations

import collections
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from manic import Mechanic
from support.tuners import state_of


def make(several: bool) -> tuple[list[nn.Linear], Mechanic]:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4) for _ in range(2)]
    base: Any
    if several:
        base = [torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9) for layer in layers]
    else:
        base = torch.optim.Adam([{"params": list(layer.parameters())} for layer in layers], lr=0.1)
    optimizer = Mechanic(base)
    train(layers, optimizer)
    return layers, optimizer


def train(layers: list[nn.Linear], optimizer: Mechanic, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        layers[1](layers[0](torch.ones(2, 4))).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("by", ["assignment", "__setstate__", "clear"])
def test_state_is_reset(by: str, several: bool) -> None:
    layers, optimizer = make(several)
    scale = optimizer.scale
    if by == "assignment":
        optimizer.state = collections.defaultdict(dict)
    elif by == "clear":
        optimizer.state.clear()
    else:
        optimizer.__setstate__({"state": collections.defaultdict(dict)})
    assert len(optimizer.state) == 0
    assert all(len(base.state) == 0 for base in optimizer.optimizers)
    assert optimizer.scale == scale
    before = layers[0].weight.detach().clone()
    train(layers, optimizer, 1)
    assert 0 < float((layers[0].weight - before).abs().max()) < 10 * float(scale)
    assert len(optimizer.state) == 4


@pytest.mark.parametrize("several", [False, True])
def test_state_is_assigned_by_parameter(several: bool) -> None:
    layers, optimizer = make(several)
    saved = {parameter: copy.copy(state) for parameter, state in optimizer.state.items()}
    optimizer.state = collections.defaultdict(dict)
    optimizer.state = collections.defaultdict(dict, saved)
    for base in optimizer.optimizers:
        for group in base.param_groups:
            for parameter in group["params"]:
                assert base.state[parameter].keys() == saved[parameter].keys()
    train(layers, optimizer)


@pytest.mark.parametrize("several", [False, True])
def test_param_groups_are_assigned(several: bool) -> None:
    layers, optimizer = make(several)
    groups, tuner = list(optimizer.param_groups), state_of(optimizer)
    new = [{key: value for key, value in group.items() if key != "mechanic"} for group in groups]
    for group in new:
        group["lr"] = 0.5
    optimizer.param_groups = new
    assert [group["lr"] for base in optimizer.optimizers for group in base.param_groups] == [0.5, 0.5]
    assert state_of(optimizer) is tuner, "the tuner goes on"
    updates = tuner[2, 0].item()
    train(layers, optimizer, 2)
    assert state_of(optimizer)[2, 0] == updates + 2


@pytest.mark.parametrize("change", ["del", "pop", "slice", "clear"])
def test_groups_of_several_bases_are_removed(change: str) -> None:
    layers, optimizer = make(True)
    if change == "del":
        del optimizer.param_groups[1]
    elif change == "pop":
        optimizer.param_groups.pop()
    elif change == "slice":
        optimizer.param_groups[1:] = []
    else:
        kept = optimizer.param_groups[0]
        optimizer.param_groups.clear()
        assert optimizer.param_groups == []
        optimizer.optimizers[0].param_groups.append(kept)
    assert len(optimizer.param_groups) == 1
    assert [len(base.param_groups) for base in optimizer.optimizers] == [1, 0]
    optimizer.rebase()
    before = layers[1].weight.detach().clone()
    train(layers, optimizer)
    assert torch.equal(layers[1].weight, before)


def append(optimizer: Mechanic) -> None:
    optimizer.param_groups.append({"params": [nn.Parameter(torch.ones(2))]})


def reverse(optimizer: Mechanic) -> None:
    optimizer.param_groups.reverse()


def assign_another(optimizer: Mechanic) -> None:
    optimizer.param_groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": 1.0}]


@pytest.mark.parametrize("change", [append, reverse, assign_another])
def test_groups_that_are_of_no_base_are_refused(change: Callable[[Mechanic], None]) -> None:
    _, optimizer = make(True)
    before = [list(base.param_groups) for base in optimizer.optimizers]
    with pytest.raises(ValueError, match="call add_param_group on the base optimizer"):
        change(optimizer)
    assert [list(base.param_groups) for base in optimizer.optimizers] == before


def test_defaults_are_the_bases() -> None:
    _, optimizer = make(False)
    optimizer.defaults["weight_decay"] = 0.5
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert optimizer.param_groups[-1]["weight_decay"] == 0.5
    assert optimizer.optimizers[0].defaults["weight_decay"] == 0.5


def test_defaults_of_several_are_read_only() -> None:
    _, optimizer = make(True)
    assert optimizer.defaults["momentum"] == 0.9
    with pytest.raises(TypeError, match="defaults of several"):
        optimizer.defaults["momentum"] = 0.5
    with pytest.raises(TypeError, match="defaults of several"):
        optimizer.defaults.update(momentum=0.5)
    with pytest.raises(TypeError, match="defaults of several"):
        optimizer.defaults.pop("momentum")
    with pytest.raises(TypeError, match="defaults of several"):
        del optimizer.defaults["momentum"]
    with pytest.raises(TypeError, match="defaults of several"):
        optimizer.defaults |= {"momentum": 0.5}
    with pytest.raises(TypeError, match="defaults of several"):
        optimizer.defaults = {}


def test_one_cycle_cycles_the_momentum_of_several_bases() -> None:
    layers, optimizer = make(True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=9)
    seen = []
    for _ in range(8):
        train(layers, optimizer, 1)
        scheduler.step()
        seen.append([(group["lr"], group["momentum"]) for base in optimizer.optimizers for group in base.param_groups])
    assert all(first == second for first, second in seen)
    assert len({first for first, _ in seen}) == 8


def test_one_cycle_refuses_bases_without_a_common_momentum() -> None:
    layers = [nn.Linear(4, 4) for _ in range(2)]
    bases = [torch.optim.SGD(layers[0].parameters(), lr=0.1, momentum=0.9), torch.optim.Adam(layers[1].parameters())]
    with pytest.raises(ValueError, match="momentum"):
        torch.optim.lr_scheduler.OneCycleLR(Mechanic(bases), max_lr=1.0, total_steps=9)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))], ids=["copy", "pickle"]
)
def test_copies_go_on_alike(how: Any, several: bool) -> None:
    layers, optimizer = make(several)
    others, other = how((layers, optimizer))
    train(layers, optimizer)
    train(others, other)
    assert optimizer.scale == other.scale
    for layer, twin in zip(layers, others):
        assert torch.equal(layer.weight, twin.weight)


@pytest.mark.parametrize(
    "how",
    [copy.copy, copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_of_groups_and_defaults_are_lists_and_dicts_of_their_own(how: Any) -> None:
    layers, optimizer = make(True)
    groups, defaults = how(optimizer.param_groups), how(optimizer.defaults)
    assert type(groups) is list
    assert type(defaults) is dict
    groups.clear()
    defaults["lr"] = 5.0
    assert [len(base.param_groups) for base in optimizer.optimizers] == [1, 1]
    train(layers, optimizer)


@pytest.mark.parametrize("several", [False, True])
def test_state_assigned_to_itself_before_the_first_step(several: bool) -> None:
    layers = [nn.Linear(4, 4) for _ in range(2)]
    bases = [torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9) for layer in layers]
    optimizer = Mechanic(bases if several else torch.optim.Adam([p for layer in layers for p in layer.parameters()]))
    optimizer.state = optimizer.state
    train(layers, optimizer)
    assert len(optimizer.state) == 4
