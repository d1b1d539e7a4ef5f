"""Base optimizers that hold positions of their own are refused on all ranks; others are not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from manic import Mechanic
from manic.optimizer.positions import FIRST_STEPS
from manic.testing import ranks
from manic.tuners.registry import TUNERS
from support.bases import SignMomentum, TrustRatio
from support.positions import (
    Anchored,
    AnchoredBySample,
    Averages,
    Base,
    FlatMasters,
    FlatMastersInState,
    GlobalEntry,
    HoldsItsParameters,
    KeepsGradient,
    KeepsOddTensors,
    KeepsTeacher,
    Lookahead,
    Masks,
    Masters,
    MastersByParameter,
    MastersFromTheStart,
    MastersInAList,
    MastersInAModule,
    MastersInAnObject,
    MastersInAnOptimizer,
    MomentumOfUpdates,
    StartsAtOnes,
    StartsAtTheUnitMatrix,
)
from support.problems import problem

REFUSED: list[type[Base]] = [
    Masters, MastersFromTheStart, MastersInAList, MastersInAnOptimizer, MastersInAModule, MastersByParameter,
    MastersInAnObject, FlatMasters, FlatMastersInState, Lookahead, Averages, Anchored, AnchoredBySample,
]  # fmt: skip
ACCEPTED: list[Callable[..., Optimizer]] = [
    MomentumOfUpdates, KeepsGradient, StartsAtOnes, HoldsItsParameters, KeepsTeacher, KeepsOddTensors, GlobalEntry,
    SignMomentum, TrustRatio,
]  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {}, {"variant": "optax"}, {"variant": "pytorch"}, {"nonfinite": "ignore"},
    {"variant": "optax", "store_delta": False}, {"update": "snapshot"}, {"update": "decoupled"},
    {"variant": "optax", "update": "coupled"},
]  # fmt: skip


def train(optimizer: Mechanic, loss: Callable[[int], Tensor], steps: int = FIRST_STEPS + 4) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("base", REFUSED)
def test_refused(base: type[Base], options: dict[str, Any], dtype: torch.dtype) -> None:
    parameters, loss = problem(dtype)
    optimizer = Mechanic(base(parameters), **options)
    with pytest.raises(TypeError, match=f"cannot scale {base.__name__}.*position of parameter 0.*Switch it off"):
        train(optimizer, loss)


@pytest.mark.parametrize("base", [Masters, MastersInAList])
def test_nothing_has_changed_after_the_first_step(base: type[Base]) -> None:
    parameters, loss = problem()
    start = [p.detach().clone() for p in parameters]
    optimizer = Mechanic(base(parameters))
    with pytest.raises(TypeError):
        train(optimizer, loss)
    assert all(torch.equal(p, before) for p, before in zip(parameters, start))
    assert optimizer.scale == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("base", ACCEPTED)
def test_accepted(base: Callable[..., Optimizer], options: dict[str, Any], dtype: torch.dtype) -> None:
    parameters, loss = problem(dtype)
    optimizer = Mechanic(base(parameters, lr=1.0), **options)
    train(optimizer, loss)
    assert optimizer.scale > 0


STARTS = {
    "zeros": torch.zeros(40), "ones": torch.ones(40), "unit": torch.eye(7), "gradient": torch.linspace(-1, 1, 40),
    "small": torch.full((40,), 1e-3),
}  # fmt: skip


@pytest.mark.parametrize("variant", TUNERS)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    "base", [MomentumOfUpdates, KeepsGradient, StartsAtOnes, SignMomentum, StartsAtTheUnitMatrix, Masks]
)
def test_accepted_where_state_equals_the_parameter_by_chance(
    base: Callable[..., Optimizer], start: str, variant: str
) -> None:
    """Parameters that start at 0 are their first updates; the gradient of |x|^2 / 2 is x."""
    x = STARTS[start].clone().requires_grad_()
    optimizer = Mechanic(base([x], lr=1.0), variant=variant)
    direction = torch.linspace(-1, 2, x.numel()).view_as(x)
    train(optimizer, lambda step: (x * x).sum() / 2 if start == "gradient" else (x * direction).sum())


class Switches(torch.optim.SGD):
    """As Schedule-Free: the parameters are elsewhere for evaluation."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def test_train_and_eval_are_refused_at_construction() -> None:
    with pytest.raises(TypeError, match="cannot wrap Switches: by its train\\(\\) and eval\\(\\)"):
        Mechanic(Switches(problem()[0], lr=1.0))


@ranks(2)
def test_refused_on_all_ranks_under_fsdp2() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1)).double()  # the last one is on one rank
    fully_shard(model)
    optimizer = Mechanic(Masters(model.parameters()))
    x = torch.randn(8, 6, dtype=torch.float64)
    with pytest.raises(TypeError, match="rank 0: Mechanic cannot scale Masters"):
        train(optimizer, lambda step: model(x).square().mean())


@ranks(2)
def test_refused_on_all_ranks_if_one_stage_has_it() -> None:
    rank = dist.get_rank()
    parameters = [nn.Parameter(torch.randn(4, 4 + rank))]
    optimizer = Mechanic(SignMomentum(parameters) if rank == 0 else Lookahead(parameters), pipeline_stages=2)
    with pytest.raises(TypeError, match="rank 1: Mechanic cannot scale Lookahead"):
        train(optimizer, lambda step: parameters[0].square().mean())


class Lion(SignMomentum):
    """Updates of one length and, here, of one sign: parameters that start at 0 lie on the line of every step."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", [Lion, MomentumOfUpdates, KeepsGradient])
def test_accepted_after_a_resume_of_parameters_that_started_at_zero(
    base: Callable[..., Optimizer], dtype: torch.dtype
) -> None:
    direction = torch.linspace(-1, 2, 40, dtype=dtype)
    saved = None
    for _ in range(4):
        x = torch.zeros(40, dtype=dtype, requires_grad=True)
        optimizer = Mechanic(base([x], lr=1.0), variant="optax")
        if saved is not None:
            optimizer.load_state_dict(saved[0])
            x.data.copy_(saved[1])
        train(optimizer, lambda step, x=x: (x * direction).sum(), 5)  # type: ignore[misc]
        saved = optimizer.state_dict(), x.detach().clone()
    assert optimizer.scale > 0


def test_a_copy_in_the_first_steps_is_not_refused() -> None:
    parameters, loss = problem()
    optimizer = Mechanic(MomentumOfUpdates(parameters, lr=1.0), variant="optax", update="decoupled")
    train(optimizer, loss, 3)
    other = copy.deepcopy(optimizer)
    for parameter in other.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    for _ in range(3):
        other.step()
