"""The multiplicative tuner follows the schedule, is independent of the base learning rate, and comes near a sweep."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode

from manic import Mechanic
from manic.step.guard import Nonfinite
from manic.tuners.multiplicative_reference import MultiplicativeReference
from support.failing import FailsAt
from support.problems import problem
from support.tuners import rows_of, state_of

STEPS = 60
Bases = Callable[[list[Tensor], float], torch.optim.Optimizer]


def adamw(parameters: list[Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1, eps=1e-12)


def sgd(parameters: list[Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def cosine(step: int) -> float:
    """Zero in the first step, a warm-up, and a cosine to zero."""
    return step / 5 if step < 5 else 0.5 * (1.0 + math.cos(math.pi * (step - 5) / (STEPS - 5)))


def stable(step: int) -> float:
    """Zero in the first step, a warm-up, a long constant phase, and a decay."""
    return min(1.0, step / 5, 0.9 ** (step - 130))


def train(
    parameters: list[Tensor],
    loss: Callable[[int], Tensor],
    optimizer: Any,
    base: Any = None,
    schedule: Callable[[int], float] = cosine,
    steps: int = STEPS,
) -> list[float]:
    scheduler = LambdaLR(optimizer if base is None else base, schedule)
    scales = []
    for step in range(steps):
        for parameter in parameters:
            parameter.grad = None
        loss(step).backward()
        optimizer.step()
        scheduler.step()
        scales.append(float(optimizer.scale))
    return scales


@pytest.mark.parametrize("options", [{}, {"store_delta": False}, {"nonfinite": "ignore"}], ids=str)
@pytest.mark.parametrize(("schedule", "steps"), [(cosine, STEPS), (stable, 150)])
@pytest.mark.parametrize("bases", [adamw, sgd])
def test_equals_the_reference_under_a_schedule(
    bases: Bases, schedule: Callable[[int], float], steps: int, options: dict[str, Any]
) -> None:
    theirs, loss = problem()
    base = bases(theirs, 0.5)
    expected = train(theirs, loss, MultiplicativeReference(theirs, base), base, schedule, steps)
    mine, loss = problem()
    optimizer = Mechanic(bases(mine, 0.5), variant="multiplicative", **options)
    scales = train(mine, loss, optimizer, None, schedule, steps)
    assert scales[0] == 0.0, "with a learning rate of 0 there is no update to take the scale from"
    assert scales == pytest.approx(expected, rel=1e-8)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-8, atol=1e-8)
    optimizer.check_consistency()


@pytest.mark.parametrize("bases", [adamw, sgd])
def test_is_independent_of_the_base_learning_rate(bases: Bases) -> None:
    found = []
    for lr in (1e-6, 1.0, 1e2):
        parameters, loss = problem()
        scales = train(parameters, loss, Mechanic(bases(parameters, lr), variant="multiplicative"))
        found.append((scales[-1] * lr, torch.cat([p.detach().flatten() for p in parameters])))
    for rate, values in found[1:]:
        assert rate == pytest.approx(found[0][0], rel=1e-6)
        torch.testing.assert_close(values, found[0][1], rtol=1e-6, atol=1e-6)


def final_loss(bases: Bases, lr: float, variant: str | None) -> float:
    parameters, loss = problem()
    base = bases(parameters, lr)
    scheduler = LambdaLR(base, cosine)
    optimizer = base if variant is None else Mechanic(base, variant=variant)
    for repeat in range(5 * STEPS):
        for parameter in parameters:
            parameter.grad = None
        loss(repeat).backward()
        optimizer.step()
        if repeat % 5 == 0:
            scheduler.step()
    with torch.no_grad():
        return sum(loss(step).item() for step in range(20)) / 20


@pytest.mark.parametrize("bases", [adamw, sgd])
def test_comes_near_the_best_of_a_sweep(bases: Bases) -> None:
    best = min(final_loss(bases, 2.0**power, None) for power in range(-12, 2))
    found = final_loss(bases, 1.0, "multiplicative")
    assert found < 2.5 * best
    assert found < 0.6 * final_loss(bases, 1.0, "optax")


@pytest.mark.parametrize("bases", [adamw, sgd])
@pytest.mark.parametrize("s_init", [1e-8, 1e-4, 1e-1])
def test_gradients_that_say_nothing_keep_the_scale_bounded(s_init: float, bases: Bases) -> None:
    generator = torch.Generator().manual_seed(0)
    parameter = torch.randn(400, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = Mechanic(bases([parameter], 1.0), s_init=s_init)
    distances = []
    for _ in range(2500):
        parameter.grad = torch.randn(400, generator=generator, dtype=torch.float64)
        optimizer.step()
        near, x = optimizer.state[parameter]["mechanic_x_ref_1"], parameter.detach()
        distances.append(float((x - near).norm() / x.norm()))
    assert 0.05 < min(distances[1000:]) < max(distances[1000:]) < 0.5, "the usual one is 0.09"


def test_no_reference_is_fixed() -> None:
    parameters, loss = problem()
    optimizer = Mechanic(sgd(parameters, 1.0))
    before: list[Tensor] = []
    for step in range(12):
        train(parameters, lambda _: loss(step), optimizer, schedule=lambda _: 1.0, steps=1)  # noqa: B023
        states = [optimizer.state[parameter] for parameter in parameters]
        own = {key for state in states for key in state if key.startswith("mechanic")}
        assert own == {"mechanic_x_ref", "mechanic_x_ref_1"}
        now = [state[key].clone() for state in states for key in sorted(own)]
        assert not any(torch.equal(a, b) for a, b in zip(before, now))
        before = now


@pytest.mark.parametrize("bases", [adamw, sgd])
def test_scale_settles_in_a_long_run_at_a_constant_rate(bases: Bases) -> None:
    parameters, loss = problem()
    optimizer = Mechanic(bases(parameters, 1.0), variant="multiplicative")
    scales = train(parameters, loss, optimizer, schedule=lambda step: 1.0, steps=1200)
    assert max(scales[300:]) < 5 * min(scales[300:])
    assert max(scales[800:]) < 2 * min(scales[800:])


def test_has_no_host_sync_once_the_scale_is_set() -> None:
    class HostSyncs(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += "_local_scalar_dense" in str(func)
            return func(*args, **(kwargs or {}))

    parameters, loss = problem()
    base = torch.optim.SGD(parameters, lr=1.0, foreach=False)
    optimizer = Mechanic(base, variant="multiplicative", nonfinite="ignore")
    counts = []
    for step in range(3):
        optimizer.zero_grad()
        loss(step).backward()
        with HostSyncs() as syncs:
            optimizer.step()
        counts.append(syncs.count)
    assert counts[0] > 0
    assert counts[1:] == [0, 0]


def test_rebase_and_missing_gradients_keep_the_scale() -> None:
    parameters, loss = problem()
    optimizer = Mechanic(sgd(parameters, 1.0), variant="multiplicative")
    train(parameters, loss, optimizer)
    scale, before = optimizer.scale, [p.detach().clone() for p in parameters]
    optimizer.rebase()
    for parameter in parameters:
        parameter.grad = None
        state = optimizer.state[parameter]
        assert all(torch.equal(state[name], parameter) for name in ("mechanic_x_ref", "mechanic_x_ref_1"))
    optimizer.step()
    assert optimizer.scale == scale
    assert all(torch.equal(p, x) for p, x in zip(parameters, before))


def test_s_max_bounds_the_first_step() -> None:
    parameters, loss = problem()
    optimizer = Mechanic(adamw(parameters, 1.0), variant="multiplicative", s_max=1e-5)
    assert max(train(parameters, loss, optimizer)) == pytest.approx(1e-5)


@pytest.mark.parametrize("start", [1e-3, 1e-8])
@pytest.mark.parametrize("bases", [adamw, sgd])
def test_a_warm_up_may_start_near_zero(bases: Bases, start: float) -> None:
    """Otherwise the initial scale, computed from the first update, would be far too large for the second."""
    parameters, loss = problem()
    base = bases(parameters, 1.0)
    scheduler = LambdaLR(base, lambda step: start + (1.0 - start) * min(1.0, step / 20))
    optimizer = Mechanic(base, variant="multiplicative")
    before = [p.detach().clone() for p in parameters]
    for step in range(40):
        for parameter in parameters:
            parameter.grad = None
        loss(step).backward()
        optimizer.step()
        scheduler.step()
        if step == 3:
            assert max(float((p.detach() - x).abs().max()) for p, x in zip(parameters, before)) < 0.05
    with torch.no_grad():
        assert sum(loss(step).item() for step in range(20)) / 20 < 1.0


@pytest.mark.parametrize("nonfinite", ["raise", "ignore"])
def test_groups_of_two_dtypes_use_their_weight_decay(nonfinite: Nonfinite) -> None:
    moved = []
    for together in (True, False):
        wide = torch.full((4,), 2.0, requires_grad=True)
        narrow = torch.full((4,), 2.0, dtype=torch.bfloat16, requires_grad=True)
        groups = [{"params": [wide, narrow]}] if together else [{"params": [wide]}, {"params": [narrow]}]
        base = torch.optim.SGD(groups, lr=1.0, weight_decay=0.5)
        optimizer = Mechanic(base, variant="multiplicative", s_init=1e-2, nonfinite=nonfinite)
        for _ in range(5):
            wide.grad, narrow.grad = torch.zeros_like(wide), torch.zeros_like(narrow)
            wide.grad[0], narrow.grad[0] = 1e-3, 1e-3
            optimizer.step()
        moved.append((wide.detach().clone(), narrow.detach().float()))
    assert (moved[0][0] < 1.99).all()
    for a, b in zip(*moved):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=0.0)


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "ignore"])
def test_an_error_at_the_initial_scale_defers_it_to_the_next_step(nonfinite: Nonfinite) -> None:
    scales = []
    for fails in (False, True):
        parameters, loss = problem()
        optimizer = Mechanic(adamw(parameters, 1.0), variant="multiplicative", nonfinite=nonfinite)
        for step in range(6):
            optimizer.zero_grad()
            loss(step).backward()
            for group in optimizer.param_groups:
                group["lr"] = float(step > 1)
            if fails and step == 2:
                with pytest.raises(MemoryError), FailsAt(1, name="addcmul.default"):  # while x is written
                    optimizer.step()
            optimizer.step()
        scales.append(float(optimizer.scale))
    assert scales[0] > 0
    assert scales[1] == pytest.approx(scales[0], rel=0.5)  # the base has seen one gradient twice


def test_base_hooks_see_the_unscaled_learning_rate() -> None:
    found = []
    for hooked in (False, True):
        parameters, loss = problem()
        base = adamw(parameters, 0.5)
        scheduler = LambdaLR(base, cosine)
        optimizer = Mechanic(base, variant="multiplicative")
        if hooked:
            base.register_step_post_hook(lambda *_, scheduler=scheduler: scheduler.step())
        for step in range(30):
            optimizer.zero_grad()
            loss(step).backward()
            optimizer.step()
            if not hooked:
                scheduler.step()
        found.append((base.param_groups[0]["lr"], float(optimizer.scale)))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("lr", [torch.tensor([0.1]), torch.tensor(0.1), 0.1])
def test_learning_rates_may_be_tensors_of_any_shape(lr: Any) -> None:
    parameters, loss = problem()
    groups = [{"params": parameters[:1], "lr": lr}, {"params": parameters[1:], "lr": 0.05}]
    optimizer = Mechanic(torch.optim.SGD(groups, foreach=False), variant="multiplicative")
    for step in range(5):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
    assert float(rows_of(state_of(optimizer), "multiplicative")["largest_lr"]) == pytest.approx(0.1)
    assert optimizer.param_groups[0]["lr"] is lr


def test_rebase_after_a_load_continues_bit_for_bit() -> None:
    parameters, loss = problem()
    optimizer = Mechanic(sgd(parameters, 1.0), variant="multiplicative")
    train(parameters, loss, optimizer)
    others = [p.detach().clone().requires_grad_() for p in parameters]
    resumed = Mechanic(sgd(others, 1.0), variant="multiplicative")
    resumed.load_state_dict(optimizer.state_dict())
    for each in (optimizer, resumed):
        each.rebase()
    for step in range(25):
        for mine, each in ((parameters, optimizer), (others, resumed)):
            for parameter, other in zip(mine, parameters):
                parameter.grad = (other.detach() + step % 3 - 1).clone()
            each.step()
        assert torch.equal(state_of(optimizer), state_of(resumed))
