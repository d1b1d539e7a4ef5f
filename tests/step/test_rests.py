"""Early sums in one of several steps: S and references move in that step only, and everything else in all of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from manic import Mechanic
from manic.step.guard import NonfiniteError
from manic.tuners.multiplicative import Multiplicative
from manic.tuners.multiplicative_reference import MultiplicativeReference

AFTER, INTERVAL = 4, 3


class Resting(Multiplicative):
    """The tuner, with rests that a test reaches."""

    name = "resting"
    rests = (AFTER, INTERVAL)


def build(lr: float = 1.0, **options: Any) -> tuple[nn.Linear, Mechanic]:
    torch.manual_seed(0)
    module = nn.Linear(8, 8)
    base = torch.optim.AdamW(module.parameters(), lr=lr, fused=True)
    return module, Mechanic(base, **{"variant": Resting(), **options})


def step(module: nn.Module, optimizer: Mechanic, number: int) -> float:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    (module(x) - x).square().mean().backward()
    optimizer.step()
    return float(optimizer.scale)


def references(optimizer: Mechanic) -> list[torch.Tensor]:
    return [
        value.clone()
        for state in optimizer.state.values()
        for name, value in state.items()
        if name.startswith("mechanic_x_ref")
    ]


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "ignore"])
def test_s_and_references_move_in_one_of_three_steps_and_x_in_all(nonfinite: str) -> None:
    module, optimizer = build(nonfinite=nonfinite)
    moved = []
    for number in range(13):
        scale, before, x = float(optimizer.scale), references(optimizer), module.weight.detach().clone()
        step(module, optimizer, number)
        moved.append(float(optimizer.scale) != scale)
        if number > AFTER:
            follows = any(not torch.equal(old, new) for old, new in zip(before, references(optimizer)))
            assert follows == moved[-1]
        assert not torch.equal(x, module.weight)
    due = [number < AFTER or number % INTERVAL == 0 for number in range(13)]
    assert moved[AFTER:] == due[AFTER:]


def test_the_modes_agree() -> None:
    scales = []
    for nonfinite in ("raise", "skip", "ignore"):
        module, optimizer = build(nonfinite=nonfinite)
        scales.append([step(module, optimizer, number) for number in range(12)])
    assert scales[0] == scales[1]
    assert scales[0] == pytest.approx(scales[2], rel=1e-4)


@pytest.mark.parametrize("stop", range(3, 9))
def test_a_resumed_run_is_the_same(stop: int) -> None:
    module, optimizer = build()
    for number in range(stop):
        step(module, optimizer, number)
    other, resumed = build()
    other.load_state_dict(module.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(stop, stop + 7):
        assert step(module, optimizer, number) == step(other, resumed, number)
    assert torch.equal(module.weight, other.weight)


def test_a_rise_of_the_learning_rate_divides_s_at_once() -> None:
    module, optimizer = build()
    for number in range(AFTER + 3):
        scale = step(module, optimizer, number)
    assert (AFTER + 3) % INTERVAL != 0
    optimizer.param_groups[0]["lr"] = 2.0
    assert step(module, optimizer, AFTER + 3) == pytest.approx(scale / 2, rel=1e-12)


@pytest.mark.parametrize("number", range(AFTER, AFTER + INTERVAL))
def test_the_guard_sees_every_step(number: int) -> None:
    module, optimizer = build()
    for each in range(number):
        step(module, optimizer, each)
    module.weight.grad[0, 0] = float("nan")
    with pytest.raises(NonfiniteError):
        optimizer.step()


def test_a_step_that_is_left_out_is_not_counted() -> None:
    runs = []
    for bad in (None, AFTER + 2):
        module, optimizer = build(nonfinite="skip")
        scales = []
        for number in range(12):
            if number == bad:
                module.weight.grad.fill_(float("inf"))
                optimizer.step()
            scales.append(step(module, optimizer, number))
        runs.append(scales)
    assert runs[0] == runs[1]


def test_equals_the_reference() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(8, 8).double(), nn.Linear(8, 8).double()
    theirs.load_state_dict(ours.state_dict())
    optimizer = Mechanic(torch.optim.AdamW(ours.parameters(), lr=1.0), variant=Resting())
    base = torch.optim.AdamW(theirs.parameters(), lr=1.0)
    reference = MultiplicativeReference(list(theirs.parameters()), base, rests=(AFTER, INTERVAL))
    for number in range(30):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        for module in (ours, theirs):
            module.zero_grad()
            (module(x) - x).square().mean().backward()
        for each in (optimizer, base):
            each.param_groups[0]["lr"] = 1.0 if number < 20 else 2.0
        optimizer.step()
        reference.step()
        assert float(optimizer.scale) == pytest.approx(reference.scale, rel=1e-10)
    assert torch.allclose(ours.weight, theirs.weight, rtol=1e-10)


def test_metrics_are_of_the_last_step_with_sums() -> None:
    module, optimizer = build()
    for number in range(AFTER + 3):
        step(module, optimizer, number)
    before = optimizer.metrics()
    step(module, optimizer, AFTER + 3)
    after = optimizer.metrics()
    for name in ("h", "grad_norm", "param_norm"):
        assert float(after[name]) == float(before[name]) != 0.0


def test_a_scale_per_group_has_no_rests() -> None:
    module, optimizer = build(scale="per group")
    scales = [step(module, optimizer, number) for number in range(10)]
    assert len(set(scales[AFTER:])) == len(scales[AFTER:])
