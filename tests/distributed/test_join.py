"""A step inside DDP's join() raises on every rank before its all_reduce could pair up with another one."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from manic import Mechanic, mechanize
from manic.step.guard import Nonfinite
from manic.testing import ranks

REFUSED = r"inside join\(\) of a DistributedDataParallel.*same number of steps on all ranks"


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()


def make_model() -> DistributedDataParallel:
    torch.manual_seed(0)
    return DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))


@ranks(2)
def test_torch_has_the_attribute_that_tells() -> None:
    model = make_model()
    assert model._join_config.enable is False
    with model.join():
        assert model._join_config.enable is True
        model(torch.ones(2, 4)).sum().backward()


@ranks(2)
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("nonfinite", ["raise", "ignore"])
def test_a_step_inside_join_raises_on_every_rank(steps_before: int, nonfinite: Nonfinite) -> None:
    model = make_model()
    optimizer = Mechanic(torch.optim.SGD(model.parameters(), lr=0.1), nonfinite=nonfinite, check_every=2)
    train(model, optimizer, steps_before)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=REFUSED), model.join():
        train(model, optimizer, 3 + dist.get_rank())
    assert str(optimizer.state_dict()) == str(before)
    with model.join(enable=False):
        train(model, optimizer, 2)
    optimizer.check_consistency()


@ranks(2)
@pytest.mark.parametrize("layers", [1, 2])
def test_inside_zero_too(layers: int) -> None:
    """With one layer without a bias, the second rank has no parameter."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(layers))))
    cls = mechanize(torch.optim.SGD, plain="sharded")
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=cls, lr=0.1)
    with pytest.raises(RuntimeError, match=REFUSED), Join([model, optimizer]):
        train(model, optimizer, 3 + dist.get_rank())


@ranks(2)
def test_mechanic_cannot_be_joined() -> None:
    model = make_model()
    with pytest.raises(AttributeError, match="join_hook"):
        Join([model, Mechanic(torch.optim.SGD(model.parameters(), lr=0.1))])  # type: ignore[list-item]


@ranks(2)
def test_another_model_may_be_joined() -> None:
    other, model = make_model(), make_model()
    optimizer = Mechanic(torch.optim.SGD(model.parameters(), lr=0.1))
    with other.join():
        train(model, optimizer, 2)
        other(torch.ones(2, 4)).sum().backward()


@ranks(2)
def test_a_model_in_another_module_since_the_first_step() -> None:
    torch.manual_seed(0)
    inside = nn.Linear(4, 2)
    model = DistributedDataParallel(inside)
    optimizer = Mechanic(torch.optim.SGD(inside.parameters(), lr=0.1))
    train(model, optimizer, 1)
    del model
    gc.collect()
    model = DistributedDataParallel(inside)
    train(model, optimizer, 1)
    with pytest.raises(RuntimeError, match=REFUSED), model.join():
        train(model, optimizer, 3 + dist.get_rank())
