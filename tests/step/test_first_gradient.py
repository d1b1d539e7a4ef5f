"""A run begins with its first gradient that is not 0: frameworks take steps with zero gradients to create state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from manic import Mechanic
from manic.checkpoint import Checkpointer
from manic.testing import ranks
from support.bases import SignMomentum
from support.problems import problem
from support.tuners import state_of

OPTIONS: list[dict[str, Any]] = [
    {}, {"nonfinite": "ignore"}, {"nonfinite": "skip"}, {"variant": "optax"}, {"variant": "pytorch"},
    {"variant": "optax", "store_delta": False},
]  # fmt: skip


def make(parameters: list[Tensor], base: str = "adamw", **options: Any) -> Mechanic:
    bases = {
        "adamw": lambda: torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.1),
        "sgd": lambda: torch.optim.SGD(parameters, lr=1.0, momentum=0.9, weight_decay=0.1),
        "sign": lambda: SignMomentum(parameters, weight_decay=0.1),
    }
    return Mechanic(bases[base](), **options)


def train(optimizer: Mechanic, loss: Any, steps: int = 20) -> list[float]:
    scales = []
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        scales.append(optimizer.scale.item())
    return scales


def step_without_gradient(optimizer: Mechanic, lr: float, gradient: str) -> None:
    """As frameworks do it: DeepSpeed at the lr that there is, torchtitan at 0; None where a model is not used."""
    lrs = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = lr
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter) if gradient == "zero" else None
    optimizer.step()
    optimizer.zero_grad()
    for group, before in zip(optimizer.param_groups, lrs):
        group["lr"] = before


@pytest.mark.parametrize("gradient", ["zero", "none"])
@pytest.mark.parametrize("lr", [1.0, 0.0])
@pytest.mark.parametrize("base", ["adamw", "sgd", "sign"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_changes_nothing(options: dict[str, Any], base: str, lr: float, gradient: str) -> None:
    parameters, loss = problem()
    expected = train(make(parameters, base, **options), loss)
    others, other_loss = problem()
    optimizer = make(others, base, **options)
    start = [p.detach().clone() for p in others]
    for _ in range(2):
        step_without_gradient(optimizer, lr, gradient)
    assert all(torch.equal(a, b) for a, b in zip(others, start))
    assert train(optimizer, other_loss) == expected
    assert all(torch.equal(a, b) for a, b in zip(others, parameters))
    assert rows(optimizer) == 20


def rows(optimizer: Mechanic) -> float:
    """The number of updates that the tuner has counted."""
    return state_of(optimizer)[2, 0].item()


@pytest.mark.parametrize("options", OPTIONS[::3], ids=str)
def test_creates_the_state_that_a_checkpoint_is_read_into(options: dict[str, Any], tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, Mechanic]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        return model, make(list(model.parameters()), **options)

    def go_on(model: nn.Module, optimizer: Mechanic) -> list[float]:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return train(optimizer, lambda step: (model(x) - step).square().mean(), 5)

    model, optimizer = build()
    go_on(model, optimizer)
    Checkpointer(tmp_path, model, optimizer).save(5)
    expected = go_on(model, optimizer)

    other, resumed = build()
    step_without_gradient(resumed, 1.0, "zero")
    assert get_optimizer_state_dict(other, resumed)["state"]
    Checkpointer(tmp_path, other, resumed).load()
    assert go_on(other, resumed) == expected


@pytest.mark.parametrize("options", OPTIONS[::3], ids=str)
def test_a_checkpoint_from_before_the_first_gradient(options: dict[str, Any], tmp_path: Path) -> None:
    parameters, loss = problem()
    expected = train(make(parameters, **options), loss)
    others, _ = problem()
    optimizer = make(others, **options)
    step_without_gradient(optimizer, 1.0, "zero")
    torch.save(optimizer.state_dict(), tmp_path / "state")
    again, again_loss = problem()
    resumed = make(again, **options)
    resumed.load_state_dict(torch.load(tmp_path / "state"))
    assert train(resumed, again_loss) == expected


def test_weight_decay_alone_gives_no_first_scale() -> None:
    """The run has begun at a learning rate of 0; then comes a step whose only update is weight decay."""
    parameters, loss = problem()
    optimizer = Mechanic(torch.optim.SGD(parameters, lr=0.0, weight_decay=0.1))
    train(optimizer, loss, 1)
    optimizer.param_groups[0]["lr"] = 1.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert optimizer.scale == 0
    train(optimizer, loss, 1)
    assert optimizer.scale > 0


@ranks(2)
def test_one_rank_with_a_gradient_begins_the_run() -> None:
    model = nn.Linear(4, 4).double()
    fully_shard(model)
    optimizer = make(list(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert rows(optimizer) <= 0
    rank = torch.distributed.get_rank()
    model.weight.grad.to_local().fill_(float(rank))
    optimizer.step()
    assert rows(optimizer) == 1
    assert optimizer.scale > 0


class Counts(torch.optim.Optimizer):
    """Counts its steps in its groups and attributes, as apex's FusedAdam does."""

    def __init__(self, params: Any) -> None:
        self.calls, self.fails = 0, False
        super().__init__(params, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls += 1
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(0.9)
                    average = self.state[p].setdefault("average", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                    p.add_(average / (1 - 0.9 ** group["step"]), alpha=-group["lr"] / self.calls)
                    if self.fails:
                        raise MemoryError("out of luck")


@pytest.mark.parametrize("gradient", ["zero", "none"])
@pytest.mark.parametrize("variant", ["optax", "multiplicative"])
def test_counts_outside_of_the_state_are_restored(variant: str, gradient: str) -> None:
    parameters, loss = problem()
    expected = train(Mechanic(Counts(parameters), variant=variant), loss)
    others, other_loss = problem()
    optimizer = Mechanic(Counts(others), variant=variant)
    for _ in range(3):
        step_without_gradient(optimizer, 1.0, gradient)
    optimizer.param_groups[0]["lr"] = 1.0
    assert train(optimizer, other_loss) == expected
    assert optimizer.param_groups[0]["step"] == 20


def test_an_error_while_state_is_created_changes_nothing() -> None:
    parameters, loss = problem()
    expected = train(Mechanic(Counts(parameters), variant="optax"), loss)
    others, other_loss = problem()
    base = Counts(others)
    optimizer, start = Mechanic(base, variant="optax"), [p.detach().clone() for p in others]
    base.fails = True
    with pytest.raises(MemoryError):
        step_without_gradient(optimizer, 1.0, "zero")
    base.fails = False
    assert all(torch.equal(a, b) for a, b in zip(others, start))
    assert len(optimizer.state) == 0
    assert train(optimizer, other_loss) == expected


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_held_gradient_gives_no_first_scale(weight_decay: float) -> None:
    """As LoRA trained in turns: while B is 0, A has no gradient, and B has one but a learning rate of 0."""
    a, b = torch.randn(4, 5).requires_grad_(), torch.zeros(5, 3, requires_grad=True)
    groups: list[dict[str, Any]] = [{"params": [a]}, {"params": [b], "lr": 0.0}]
    optimizer = Mechanic(torch.optim.AdamW(groups, lr=1.0, weight_decay=weight_decay))
    (a @ b - 1.0).square().sum().backward()
    optimizer.step()
    assert optimizer.scale == 0
