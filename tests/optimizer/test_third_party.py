"""What optimizers of other packages do that torch's do not: it works, or is refused with words."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from manic import Mechanic
from manic.tuners.registry import TUNERS
from support.positions import Base
from support.problems import problem


class CountsItsState(Base):
    """As timm's Adahessian: one entry from the constructor on, and the others where there is no more than that one."""

    def begin(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] = 0

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        if len(state) == 1:
            state["average"] = torch.zeros_like(p)
        assert state.keys() == {"step", "average"}
        state["step"] += 1
        p.add_(state["average"].lerp_(g, 0.1), alpha=-lr)


def train(optimizer: Optimizer, closure: Any = None) -> None:
    for step in range(5):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = parameter.detach() - 0.1 * step
        optimizer.step(closure)


@pytest.mark.parametrize("variant", TUNERS)
def test_the_base_optimizer_sees_no_entry_but_its_own(variant: str) -> None:
    parameters, _ = problem()
    optimizer = Mechanic(CountsItsState(parameters), variant=variant)
    train(optimizer)
    resumed = Mechanic(CountsItsState([p.detach().clone().requires_grad_() for p in parameters]), variant=variant)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, resumed):
        train(each)
    assert optimizer.scale == resumed.scale > 0


class WithoutGroups(torch.optim.SGD):
    """As pytorch_optimizer's SafeFP16Optimizer: an optimizer by its class only."""

    def __init__(self) -> None: ...


def test_an_optimizer_without_param_groups_is_refused() -> None:
    with pytest.raises(TypeError, match="WithoutGroups has no param_groups"):
        Mechanic(WithoutGroups())


class NeedsClosure(Base):
    def step(self, closure: Any) -> None:
        closure()


def test_an_optimizer_whose_step_needs_a_closure_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot wrap NeedsClosure: its step needs a closure"):
        Mechanic(NeedsClosure(problem()[0]))


class AsksForClosure(Base):
    """As SAM: that its step needs a closure shows only when it is called."""

    def step(self, closure: Any = None) -> None:
        if closure is None:
            raise ValueError("AsksForClosure requires closure")


def test_the_error_of_a_step_that_asks_for_its_closure_is_explained() -> None:
    parameters, _ = problem()
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(ValueError, match="requires closure") as caught:
        train(Mechanic(AsksForClosure(parameters)), lambda: 1.0)
    assert any("calls the closure once" in note for note in caught.value.__notes__)
    assert all(torch.equal(p, q) for p, q in zip(parameters, before))
