"""The multiplicative tuner follows the schedule, is independent of the base learning rate, and matches a sweep."""

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
    expected = train(theirs, loss, MultiplicativeReference(theirs, base, 1e-4), base, schedule, steps)
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
def test_matches_the_best_of_a_sweep(bases: Bases) -> None:
    best = min(final_loss(bases, 2.0**power, None) for power in range(-12, 2))
    assert final_loss(bases, 1.0, "multiplicative") < 1.25 * best < 0.5 * final_loss(bases, 1.0, "optax")


@pytest.mark.parametrize("bases", [adamw, sgd])
def test_scale_settles_in_a_long_run_at_a_constant_rate(bases: Bases) -> None:
    parameters, loss = problem()
    optimizer = Mechanic(bases(parameters, 1.0), variant="multiplicative")
    scales = train(parameters, loss, optimizer, schedule=lambda step: 1.0, steps=1200)
    assert max(scales[300:]) < 5 * min(scales[300:])
    assert max(scales[800:]) < 1.5 * min(scales[800:])


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
    optimizer.step()
    assert optimizer.scale == scale
    assert all(torch.equal(p, x) for p, x in zip(parameters, before))


def test_s_max_bounds_the_first_step() -> None:
    parameters, loss = problem()
    optimizer = Mechanic(adamw(parameters, 1.0), variant="multiplicative", s_max=1e-5)
    assert max(train(parameters, loss, optimizer)) == pytest.approx(1e-5)


@pytest.mark.parametrize("options", [{}, {"store_delta": False}, {"nonfinite": "ignore"}], ids=str)
def test_a_large_fall_of_the_scale_rebases(options: dict[str, Any]) -> None:
    """Without a restart, parameters displaced by a too large scale could not return at the small one."""
    target = torch.arange(1.0, 5.0, dtype=torch.float64)
    parameter = target.clone().mul_(0.5).requires_grad_()
    optimizer = Mechanic(torch.optim.SGD([parameter], lr=1.0), variant="multiplicative", s_init=0.5, **options)
    kept: list[Tensor] = []
    fallen: list[float] = []
    for _ in range(80):
        # The gradient always points along the displacement, as if the scale were too large.
        parameter.grad = (
            parameter.detach() - optimizer.state.get(parameter, {}).get("mechanic_x_ref", 0.0 * target)
        ) + 0.1
        optimizer.step()
        kept.append(optimizer.state[parameter]["mechanic_x_ref"].clone())
        fallen.append(float(optimizer.scale))
        optimizer.check_consistency()
    moved = [step for step in range(1, 80) if not torch.equal(kept[step], kept[step - 1])]
    assert moved, "x_ref has not moved, though the scale fell"
    assert all((step + 1) % 10 == 0 for step in moved)
    first = moved[0]
    assert 4 * fallen[first] < max(fallen[: first + 1])
    assert first == 9 or 4 * fallen[first - 10] >= max(fallen[: first - 9])


def fallen(
    share: float, dtype: torch.dtype = torch.float64, has_fallen: bool = True, **options: Any
) -> tuple[list[Tensor], Mechanic]:
    """A run before its 30th step: S is an eighth of its peak, and the learning rate is ``share`` of its largest."""
    parameters, loss = problem(dtype)
    optimizer = Mechanic(sgd(parameters, 1.0), variant="multiplicative", **options)
    train(parameters, loss, optimizer, schedule=lambda step: min(1.0, step / 5), steps=29)
    rows = rows_of(state_of(optimizer), "multiplicative")
    if has_fallen:
        rows["peak"].copy_(8.0 * rows["s"] * rows["largest_lr"])
    optimizer.param_groups[0]["lr"] = share * float(rows["largest_lr"])
    loss(29).backward()
    return parameters, optimizer


def displacement(optimizer: Mechanic, parameter: Tensor) -> Tensor:
    state = optimizer.state[parameter]
    return state.get("mechanic_delta", parameter.detach() - state["mechanic_x_ref"])


@pytest.mark.parametrize("options", [{}, {"store_delta": True}, {"nonfinite": "ignore"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("share", "rolls_back"), [(1.0, False), (0.99, True), (0.9, False)])
def test_rolls_back_only_at_the_first_fall_of_the_learning_rate(
    share: float, rolls_back: bool, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    expected, without = fallen(share, dtype, has_fallen=False, **options)
    without.step()
    parameters, optimizer = fallen(share, dtype, **options)
    rows = rows_of(state_of(optimizer), "multiplicative")
    peak = float(rows["peak"])
    optimizer.step()
    assert optimizer.scale == without.scale
    kept = float(optimizer.scale * rows["largest_lr"]) / peak if rolls_back else 1.0
    assert kept == 1.0 or 0.1 < kept < 0.15
    assert rows["peak"] == optimizer.scale * rows["largest_lr"]
    for parameter, other in zip(parameters, expected):
        state = optimizer.state[parameter]
        assert torch.equal(state["mechanic_x_ref"], parameter)
        if not rolls_back:
            assert torch.equal(parameter, other)
        expected_displacement = displacement(without, other)
        assert expected_displacement.abs().max() > 0.05
        x = without.state[other]["mechanic_x_ref"] + kept * expected_displacement
        whole = parameter.detach() + state.get("mechanic_delta", 0.0)
        torch.testing.assert_close(whole, x, rtol=0.0, atol=1e-7)  # in bfloat16 too: Delta has the rounding error
    optimizer.check_consistency()


@pytest.mark.parametrize(("nonfinite", "passes"), [("raise", 0), ("ignore", 3)])
def test_writes_x_ref_only_for_a_restart_if_the_host_syncs(nonfinite: str, passes: int) -> None:
    parameters, loss = problem()
    optimizer = Mechanic(sgd(parameters, 1.0), variant="multiplicative", nonfinite=nonfinite)
    with FailsAt(None, name="lerp_") as written:  # writes x_ref, and SGD does not use it
        train(parameters, loss, optimizer, steps=30)
    assert written.count == passes  # both parameters are in one batch


@pytest.mark.parametrize("share", [1.0, 0.99])
def test_a_restart_may_be_interrupted_at_any_operator(share: float) -> None:
    counts = []
    for has_fallen in (False, True):
        parameters, optimizer = fallen(share, has_fallen=has_fallen)
        with FailsAt(None) as whole:
            optimizer.step()
        counts.append(whole.count)
    without, other = fallen(share, has_fallen=False)
    other.step()
    assert counts[1] > counts[0] + 5
    for at in range(counts[0] + 1, counts[1] + 1):  # after the step itself
        parameters, optimizer = fallen(share)
        with pytest.raises(MemoryError), FailsAt(at):
            optimizer.step()
        assert optimizer.scale == other.scale
        assert share < 1.0 or all(torch.equal(p, x) for p, x in zip(parameters, without))
        optimizer.check_consistency()
    parameters, optimizer = fallen(share)
    optimizer.step()
    assert all(torch.equal(optimizer.state[p]["mechanic_x_ref"], p) for p in parameters)


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
def test_groups_of_two_dtypes_use_their_weight_decay(nonfinite: str) -> None:
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
def test_an_error_at_the_initial_scale_defers_it_to_the_next_step(nonfinite: str) -> None:
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
