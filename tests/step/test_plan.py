"""The plan of a step is cached, and replaced after a change of its inputs."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from manic import Mechanic
from manic.distributed.layout import Layout
from manic.optimizer.state import MechanicState
from manic.step.plan import Plan, Planner
from manic.tuners.registry import TUNERS, make_tuner
from support.problems import problem

Change = Callable[[list[Tensor], torch.optim.Optimizer], None]


def make(parameters: list[Tensor]) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.5, weight_decay=0.1)


def lose_a_gradient(parameters: list[Tensor], base: torch.optim.Optimizer) -> None:
    parameters[0].grad = None


def freeze(parameters: list[Tensor], base: torch.optim.Optimizer) -> None:
    parameters[0].requires_grad_(False)
    parameters[0].grad = None


def exchange_storage(parameters: list[Tensor], base: torch.optim.Optimizer) -> None:
    parameters[0].data = parameters[0].data.clone()


def exchange_strides(parameters: list[Tensor], base: torch.optim.Optimizer) -> None:
    parameters[0].data = parameters[0].data.t().contiguous().t()


def narrow(parameters: list[Tensor], base: torch.optim.Optimizer) -> None:
    for p in parameters:
        gradient, p.grad = p.grad, None
        p.data = p.data.float()
        p.grad = None if gradient is None else gradient.float()
        for name, value in base.state[p].items():
            if name != "step":
                base.state[p][name] = value.float()


def regroup(parameters: list[Tensor], base: torch.optim.Optimizer) -> None:
    first, second = base.param_groups
    first["params"], second["params"] = second["params"], first["params"]


def replace_a_group(parameters: list[Tensor], base: torch.optim.Optimizer) -> None:
    base.param_groups[0] = {**base.param_groups[0], "lr": 0.1, "weight_decay": 0.5}


def ascend(parameters: list[Tensor], base: torch.optim.Optimizer) -> None:
    base.param_groups[1]["maximize"] = True


def exchange_state(parameters: list[Tensor], base: torch.optim.Optimizer) -> None:
    for state in base.state.values():
        for name in ("mechanic_x_ref", "mechanic_delta"):
            if name in state:
                state[name] = state[name].clone()


def hook(parameters: list[Tensor], base: torch.optim.Optimizer) -> None:
    base.register_step_pre_hook(lambda *_: None)


def nothing(parameters: list[Tensor], base: torch.optim.Optimizer) -> None:
    pass


EXCHANGES: list[Change] = [exchange_storage, exchange_strides, exchange_state]
CHANGES: list[Change] = [
    lose_a_gradient, freeze, exchange_storage, exchange_strides, narrow, regroup, replace_a_group, ascend,
    exchange_state, hook,
]  # fmt: skip


def backward(parameters: list[Tensor], loss: Any, step: int) -> None:
    for p in parameters:
        p.grad = None
    if parameters[0].dtype == torch.float64:
        loss(step).backward()
    else:
        sum((p.square() * (1 + step % 3) + p).sum() for p in parameters).backward()


@pytest.mark.parametrize("change", [nothing, *CHANGES])
@pytest.mark.parametrize("variant", TUNERS)
@pytest.mark.parametrize("options", [{}, {"store_delta": False}, {"nonfinite": "ignore"}], ids=str)
def test_a_cached_plan_equals_a_new_plan_in_each_step(change: Change, variant: str, options: dict[str, Any]) -> None:
    """As after a resume, which restores the state but no plan."""
    parameters, loss = problem()
    optimizer = Mechanic(make(parameters), variant=variant, s_init=1e-3, **options)
    for step in range(6):
        backward(parameters, loss, step)
        optimizer.step()
    backward(parameters, loss, 6)
    change(parameters, optimizer.optimizers[0])
    twin = copy.deepcopy(optimizer)  # copies the parameters too, but not the plan
    others = [p for group in twin.param_groups for p in group["params"]]
    pairs = list(zip([p for group in optimizer.param_groups for p in group["params"]], others))
    for step in range(4):
        for p, q in pairs:
            generator = torch.Generator().manual_seed(step)
            gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            has_none = (step == 0 and p.grad is None) or not p.requires_grad
            p.grad, q.grad = (None, None) if has_none else (gradient, gradient.clone())
        optimizer.step()
        twin.step()
        # A copy has no hooks, so it applies S through the learning rate: equal up to rounding.
        rounding = 1e-12 if change is hook else 0.0
        for a, b in ((optimizer.scale, twin.scale), *pairs):
            torch.testing.assert_close(a, b, rtol=rounding, atol=rounding)


class TestPlanner:
    def planner(self, variant: str) -> tuple[list[Tensor], torch.optim.Optimizer, Planner]:
        parameters, loss = problem()
        base, tuner, layout = make(parameters), make_tuner(variant), Layout(None, "replicated", 1)
        state = MechanicState([base], tuner, layout, None)
        state.has_scale = (True,)
        planner = Planner([base], tuner, state.rule, layout, state, update="auto", knows_scale=True)
        loss(0).backward()
        base.step()
        return parameters, base, planner

    @staticmethod
    @torch.no_grad()
    def plan_of(planner: Planner) -> Plan:
        with planner.plan() as plan:
            return plan

    @pytest.mark.parametrize("variant", TUNERS)
    def test_keeps_the_plan(self, variant: str) -> None:
        parameters, base, planner = self.planner(variant)
        first = self.plan_of(planner)
        for p in parameters:  # as a step and a backward pass do
            with torch.no_grad():
                p.add_(1.0)
            p.grad = torch.ones_like(p)
        base.param_groups[0]["lr"] = 0.1
        assert self.plan_of(planner) is first

    @pytest.mark.parametrize("change", [each for each in CHANGES if each not in EXCHANGES])
    def test_replaces_the_plan(self, change: Change) -> None:
        parameters, base, planner = self.planner("multiplicative")
        first = self.plan_of(planner)
        change(parameters, base)
        second = self.plan_of(planner)
        assert second is not first
        assert self.plan_of(planner) is second

    @pytest.mark.parametrize("exchange", EXCHANGES)
    def test_takes_the_tensors_of_each_step(self, exchange: Change) -> None:
        parameters, base, planner = self.planner("optax")
        first = self.plan_of(planner)
        exchange(parameters, base)
        with torch.no_grad(), planner.plan() as plan:
            assert plan is first
            for shard, p in zip(plan.shards, parameters):
                assert shard.x.data_ptr() == p.data_ptr()
                assert shard.x.stride() == p.stride()
                assert shard.find(base, [p])[0][0] is base.state[p]["mechanic_x_ref"]
                assert shard.delta is base.state[p]["mechanic_delta"]
                assert shard.gradient is p.grad


def users_of(tensor: Tensor) -> int:
    """How many tensors share the storage; torch has no public way to count them."""
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return count


@pytest.mark.parametrize("variant", TUNERS)
def test_holds_no_tensors_between_steps(variant: str) -> None:
    """Whoever offloads parameters, gradients or state between steps frees their memory."""
    parameters, loss = problem()
    optimizer = Mechanic(make(parameters), variant=variant, s_init=1e-3)
    for step in range(3):
        backward(parameters, loss, step)
        optimizer.step()
    state = optimizer.state[parameters[0]]
    held = [weakref.ref(state.pop("mechanic_x_ref")), weakref.ref(parameters[0].grad)]
    if "mechanic_delta" in state:
        held.append(weakref.ref(state.pop("mechanic_delta")))
    parameters[0].grad = None
    assert [each() for each in held] == [None] * len(held)
    assert users_of(parameters[0]) == users_of(torch.ones(2, requires_grad=True))
