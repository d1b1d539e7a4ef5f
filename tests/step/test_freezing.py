"""A learning rate of 0, or requires_grad=False, keeps a parameter where it is, and its state for later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from manic import Mechanic
from manic.step import chunks
from support.bases import TrustRatio
from support.failing import EVERY, FailsAt, operators
from support.problems import problem, reference_of

BASES: dict[str, Callable[..., Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1.0, weight_decay=0.1),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.9, weight_decay=0.01),
    "trust-ratio": TrustRatio,
}
HOW = ["lr", "requires_grad"]
VARIANTS: list[dict[str, Any]] = [
    {"variant": "optax"}, {"variant": "optax", "store_delta": False}, {"variant": "pytorch"},
    {"variant": "multiplicative"}, {"variant": "multiplicative", "store_delta": True},
    {"variant": "multiplicative", "nonfinite": "ignore"},
]  # fmt: skip


def groups_of(parameters: list[Tensor]) -> list[dict[str, Any]]:
    return [{"params": [parameter]} for parameter in parameters]


def freeze(how: str, group: dict[str, Any], frozen: bool) -> None:
    if how == "lr":
        group["lr"] = 0.0 if frozen else 1.0
    else:
        for parameter in group["params"]:
            parameter.requires_grad_(not frozen)


def take_step(optimizer: Any, parameters: list[Tensor], loss: Callable[[int], Tensor], step: int) -> None:
    for parameter in parameters:
        parameter.grad = None
    loss(step).backward()
    optimizer.step()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", ["optax", "pytorch", "multiplicative"])
def test_equals_the_reference(variant: str, base: str, how: str) -> None:
    """Frozen from step 5 to 15, and from step 20 on in every second step. It goes on from where it is each time."""
    parameters, loss = problem()
    optimizer = Mechanic(BASES[base](groups_of(parameters)), variant=variant, s_init=1e-3)
    theirs, their_loss = problem()
    their_base = BASES[base](groups_of(theirs))
    reference = reference_of(variant, theirs, their_base, 1e-3)
    for step in range(30):
        frozen = 5 <= step < 15 or (step > 20 and step % 2 == 0)
        freeze(how, optimizer.param_groups[0], frozen)
        freeze(how, their_base.param_groups[0], frozen)
        take_step(optimizer, parameters, loss, step)
        take_step(reference, theirs, their_loss, step)
        assert optimizer.scale.item() == pytest.approx(reference.scale, rel=1e-9), step
    for mine, his in zip(parameters, theirs):
        torch.testing.assert_close(mine, his, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_stays_to_the_last_bit_and_keeps_its_state(
    options: dict[str, Any], dtype: torch.dtype, base: str, how: str
) -> None:
    parameters, loss = problem(dtype)
    optimizer = Mechanic(BASES[base](groups_of(parameters)), s_init=1e-3, **options)
    for step in range(8):
        take_step(optimizer, parameters, loss, step)
    frozen = parameters[0]
    before, scale = frozen.detach().clone(), optimizer.scale
    freeze(how, optimizer.param_groups[0], True)
    names, delta = set(optimizer.state[frozen]), optimizer.state[frozen].get("mechanic_delta")
    delta = None if delta is None else delta.clone()
    for step in range(8, 20):
        take_step(optimizer, parameters, loss, step)
    assert torch.equal(frozen, before)
    assert optimizer.scale != scale
    assert set(optimizer.state[frozen]) == names
    if delta is not None:
        assert torch.equal(optimizer.state[frozen]["mechanic_delta"], delta)
    optimizer.check_consistency()

    freeze(how, optimizer.param_groups[0], False)
    take_step(optimizer, parameters, loss, 20)
    assert not torch.equal(frozen, before)
    optimizer.check_consistency()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_halves_that_are_frozen_in_turn_learn_a_scale(options: dict[str, Any], how: str) -> None:
    parameters, loss = problem()
    optimizer = Mechanic(BASES["adamw"](groups_of(parameters)), **options)
    first = [loss(step).item() for step in range(20)]
    scales = []
    for step in range(300):
        for index, group in enumerate(optimizer.param_groups):
            freeze(how, group, index != step % 2)
        take_step(optimizer, parameters, loss, step)
        scales.append(optimizer.scale.item())
    assert scales[-1] > 100 * scales[0]
    assert sum(loss(step).item() for step in range(20)) < 0.7 * sum(first)


@pytest.mark.parametrize("variant", ["optax", "multiplicative"])
def test_a_learning_rate_of_zero_is_no_gradient_of_the_scale(variant: str) -> None:
    """A frozen group's gradient says nothing about how far the others should move."""

    def scale_after(frozen_gradient: float) -> float:
        parameters, loss = problem()
        extra = torch.ones(6, dtype=torch.float64, requires_grad=True)
        groups = [*groups_of(parameters), {"params": [extra]}]
        optimizer = Mechanic(
            torch.optim.SGD(groups, lr=1.0), variant=variant, s_decay=0.0 if variant == "optax" else None
        )
        for step in range(20):
            optimizer.param_groups[2]["lr"] = 1.0 if step < 5 else 0.0
            for parameter in (*parameters, extra):
                parameter.grad = None
            loss(step).backward()
            extra.grad = torch.full_like(extra, 0.01 if step < 5 else frozen_gradient)
            optimizer.step()
        return optimizer.scale.item()

    # The own tuner takes the cosine with the whole gradient, so that equal sizes are compared.
    assert scale_after(0.01) == pytest.approx(scale_after(-0.01), rel=1e-9)


@EVERY
@pytest.mark.parametrize(
    "dtype", [torch.float64, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)  # fmt: skip
@pytest.mark.parametrize("base", ["sgd", "trust-ratio"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_step_that_fails_at_any_operator_keeps_its_place(
    options: dict[str, Any], base: str, dtype: torch.dtype, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "SMALL", 10)
    monkeypatch.setattr(chunks, "CPU_PIECE", 15)  # the matrices are worked on in pieces

    def run_up() -> tuple[list[Tensor], Callable[[int], Tensor], Mechanic]:
        parameters, loss = problem(dtype)
        optimizer = Mechanic(BASES[base](groups_of(parameters)), s_init=1e-3, **options)
        for step in range(3):
            take_step(optimizer, parameters, loss, step)
        freeze("lr", optimizer.param_groups[0], True)
        take_step(optimizer, parameters, loss, 3)
        freeze("requires_grad", optimizer.param_groups[1], True)
        return parameters, loss, optimizer

    parameters, loss, optimizer = run_up()
    with FailsAt(None) as whole:
        take_step(optimizer, parameters, loss, 4)
    scale_after, endured = optimizer.scale, []
    references_after = [optimizer.state[p]["mechanic_x_ref"].clone() for p in parameters]
    for at in operators(whole.count, every, (options, base, dtype)):
        parameters, loss, optimizer = run_up()
        before, scale = [p.detach().clone() for p in parameters], optimizer.scale
        references = [optimizer.state[p]["mechanic_x_ref"].clone() for p in parameters]
        raised = False
        try:
            with FailsAt(at) as mode:
                take_step(optimizer, parameters, loss, 4)
        except MemoryError:
            raised = True
        where = f"operator {at} of {whole.count}, {mode.failed_in}"
        if not raised:  # an unknown base may stay uncompared, so that no rank waits for another
            endured.append(at)
            references = references_after
        assert optimizer.scale == (scale if raised else scale_after), where
        for parameter, x_ref in zip(parameters, references):
            rounding = 1e-12 if dtype == torch.float64 else 2**-7
            torch.testing.assert_close(
                optimizer.state[parameter]["mechanic_x_ref"], x_ref, rtol=rounding, atol=rounding, msg=where
            )
        optimizer.check_consistency()
        for parameter in parameters:
            parameter.grad = None
        loss(4).backward()
        optimizer.step()
        optimizer.check_consistency()
        for parameter, x in zip(parameters, before):
            assert torch.equal(parameter, x), where
    assert len(endured) <= (whole.count // 8 if base == "trust-ratio" else 0), endured


@pytest.mark.parametrize("variant", ["optax", "multiplicative"])
def test_an_optimizer_that_moves_at_a_learning_rate_of_zero_is_scaled(variant: str) -> None:
    """Rprop takes its learning rate for its first step only, and goes on moving, as without Mechanic."""
    parameters, loss = problem()
    optimizer = Mechanic(torch.optim.Rprop(parameters, lr=0.01), variant=variant)
    for step in range(5):
        take_step(optimizer, parameters, loss, step)
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in parameters]
    for step in range(5, 10):
        take_step(optimizer, parameters, loss, step)
    moved = max(float((p.detach() - x).abs().max()) for p, x in zip(parameters, before))
    assert 0 < moved < 5 * 0.1 * float(optimizer.scale)


def test_in_low_precision_freezing_in_turn_loses_no_small_updates() -> None:
    """bfloat16 parameters keep what they lose to rounding in Delta, also where they are frozen in every second step."""

    def final_loss(dtype: torch.dtype) -> float:
        torch.manual_seed(0)
        goal, inputs = torch.randn(6, 5), torch.randn(40, 6)
        parameters = [torch.zeros(6, 5, dtype=dtype, requires_grad=True) for _ in range(2)]
        optimizer = Mechanic(torch.optim.AdamW(groups_of(parameters), lr=1.0), variant="optax", s_init=1e-4)
        for step in range(400):
            for index, group in enumerate(optimizer.param_groups):
                freeze("lr", group, index != step % 2)
            optimizer.zero_grad()
            loss = (inputs @ (parameters[0].float() + parameters[1].float() - goal)).square().mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert final_loss(torch.bfloat16) < 4 * final_loss(torch.float32) + 1e-4
