"""Nonfinite gradients in each mode, on one process. On ranks: test_faults.py."""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manic import Mechanic, NonfiniteError
from manic.step.monitor import TOO_MANY
from manic.tuners.base import Tuner
from manic.tuners.registry import TUNERS, make_tuner
from manic.tuners.state import TunerState
from support import bases
from support.problems import problem
from support.tuners import state_of

VALUES = [math.nan, math.inf, -math.inf]
OPTIONS = [{}, {"store_delta": False}, {"update": "snapshot"}, {"variant": "pytorch"}]


def make(base: str = "AdamW-weight_decay-loop", **options: Any) -> tuple[list[Tensor], Any, Mechanic]:
    parameters, loss = problem()
    return parameters, loss, Mechanic(bases.make(base, parameters), **{"variant": "optax", "s_init": 1e-3, **options})


def train(parameters: list[Tensor], loss: Any, optimizer: Mechanic, steps: Any, bad: Any = ()) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss(step).backward()
        if step in bad:
            parameters[1].grad[2, 1] = bad[step]
        optimizer.step()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("value", VALUES)
def test_skip_equals_the_run_without_that_step(value: float, options: dict[str, Any]) -> None:
    parameters, loss, optimizer = make(nonfinite="skip", **options)
    train(parameters, loss, optimizer, range(12), bad={0: value, 4: value, 5: value})
    others, other_loss, undisturbed = make(nonfinite="skip", **options)
    train(others, other_loss, undisturbed, [step for step in range(12) if step not in (0, 4, 5)])
    assert optimizer.scale == undisturbed.scale
    for p, q in zip(parameters, others):
        assert torch.equal(p, q)
    assert optimizer.metrics()["nonfinite_steps"] == 3
    assert undisturbed.metrics()["nonfinite_steps"] == 0


@pytest.mark.parametrize("base", bases.CASES)
def test_raise_leaves_every_base_optimizer_unchanged(base: str) -> None:
    parameters, loss, optimizer = make(base)
    others, other_loss, undisturbed = make(base)
    train(parameters, loss, optimizer, range(3))
    with pytest.raises(RuntimeError, match=r"step 4 was not taken.*rank 0: 1 of 20 local elements of the gradient of "):
        train(parameters, loss, optimizer, [3], bad={3: math.nan})
    train(parameters, loss, optimizer, range(4, 7))
    train(others, other_loss, undisturbed, [0, 1, 2, 4, 5, 6])
    assert optimizer.scale == undisturbed.scale
    for p, q in zip(parameters, others):
        assert torch.equal(p, q)


def test_the_error_includes_parameter_names() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = Mechanic(torch.optim.SGD(model.named_parameters(), lr=1.0), variant="optax")
    for p in model.parameters():
        p.grad = torch.full_like(p, math.inf)
    with pytest.raises(RuntimeError, match=r"6 of 6 .* \('weight'\), shape \(2, 3\); rank 0: 2 of 2 .* \('bias'\)"):
        optimizer.step()


def test_a_skipped_first_step_does_not_set_x_ref() -> None:
    parameters, loss, optimizer = make(nonfinite="skip")
    train(parameters, loss, optimizer, [0], bad={0: math.nan})
    with torch.no_grad():
        parameters[0].mul_(2.0)  # for example weights loaded late
    start = parameters[0].detach().clone()
    train(parameters, loss, optimizer, [1])
    assert torch.equal(optimizer.state[parameters[0]]["mechanic_x_ref"], start)


def reads_x(tuner: type[Tuner]) -> bool:
    return "x_square" in (*tuner.sums, *tuner.late_sums)


@pytest.mark.parametrize("variant", [name for name, cls in TUNERS.items() if reads_x(cls)])
@pytest.mark.parametrize("when", ["before backward", "after it"])
@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_a_nonfinite_parameter_raises_despite_skip(mode: str, when: str, variant: str) -> None:
    parameters, loss, optimizer = make(nonfinite=mode, variant=variant)
    train(parameters, loss, optimizer, range(3))
    if when == "after it":
        loss(3).backward()
        if variant == "pytorch":  # it sums the parameters after the base step
            parameters[0].grad[0, 0] = math.nan
    with torch.no_grad():
        parameters[0][0, 0] = math.nan
    if when == "before backward":
        optimizer.zero_grad()
        loss(3).backward()  # its gradients are nonfinite too
    with pytest.raises(NonfiniteError, match=r"1 of 30 local elements of the value of parameter 0.*go back to a c"):
        optimizer.step()


def test_warns_about_many_skipped_steps_in_a_row(caplog: pytest.LogCaptureFixture) -> None:
    parameters, loss, optimizer = make(nonfinite="skip")
    train(parameters, loss, optimizer, range(TOO_MANY - 1), bad=dict.fromkeys(range(TOO_MANY), math.nan))
    assert not caplog.records
    train(parameters, loss, optimizer, range(40), bad=dict.fromkeys(range(40), math.nan))
    assert [f"left out {TOO_MANY} steps in a row" in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_a_skipped_first_step_leaves_no_state(mode: str) -> None:
    parameters, loss, optimizer = make(nonfinite=mode)
    with contextlib.suppress(NonfiniteError):
        train(parameters, loss, optimizer, [0], bad={0: math.nan})
    assert len(optimizer.state) == 0
    assert not optimizer.state  # torch's checkpointing creates a state if this is false


@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_a_skipped_step_after_a_load_does_not_reset_the_state(mode: str) -> None:
    parameters, loss, optimizer = make(nonfinite=mode)
    train(parameters, loss, optimizer, range(8))
    saved = copy.deepcopy(([p.detach() for p in parameters], optimizer.state_dict()))
    others, other_loss, resumed = make(nonfinite=mode)
    with torch.no_grad():
        for p, x in zip(others, saved[0]):
            p.copy_(x)
    resumed.optimizers[0].load_state_dict(saved[1])  # not through the wrapper
    with contextlib.suppress(NonfiniteError):
        train(others, other_loss, resumed, [8], bad={8: math.nan})
    train(others, other_loss, resumed, range(9, 12))
    train(parameters, loss, optimizer, range(9, 12))
    assert resumed.scale == optimizer.scale
    for p, q in zip(others, parameters):
        assert torch.equal(p, q)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ignore_continues_and_keeps_the_tuner_finite(options: dict[str, Any]) -> None:
    parameters, loss, optimizer = make(nonfinite="ignore", **options)
    train(parameters, loss, optimizer, range(4))
    scale = optimizer.scale
    train(parameters, loss, optimizer, [4], bad={4: math.inf})
    assert optimizer.scale == scale
    assert not parameters[1].isfinite().all(), "the base optimizer must get the unchanged gradient"
    train(parameters, loss, optimizer, range(5, 8))
    assert state_of(optimizer).isfinite().all()
    assert optimizer.metrics()["nonfinite_steps"] == 4
    assert optimizer.scale == scale


def test_the_three_modes_agree_on_finite_gradients() -> None:
    found = []
    for mode in ("raise", "skip", "ignore"):
        parameters, loss, optimizer = make(nonfinite=mode)
        train(parameters, loss, optimizer, range(20))
        found.append((optimizer.scale, *(p.detach().clone() for p in parameters)))
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert torch.equal(a, b)


@pytest.mark.parametrize("variant", TUNERS)
@settings(deadline=None, max_examples=200)
@given(steps=st.lists(st.tuples(*[st.floats(width=64)] * 7), min_size=1, max_size=12), s_init=st.floats(1e-30, 1e10))
def test_nonfinite_sums_do_not_reach_the_tuner(variant: str, steps: list[tuple[float, ...]], s_init: float) -> None:
    """For any floats: infinities, nans, subnormals, and numbers whose squares overflow."""
    options = {"betas": (0.9, 0.999, 0.999999)} if variant in ("optax", "pytorch") else {}
    tuner = make_tuner(variant, s_init=s_init, **options)
    state = TunerState(tuner)
    names = ("delta_grad", "grad_square", "delta_square", "delta_x", "x_square", "lr", "update_square")
    further = ("delta_grad_1", "delta_square_1")
    for count, numbers in enumerate(steps, start=1):
        before = state.tensor.clone()
        values = dict(zip(names, (*numbers[:3], numbers[2], *numbers[3:5], 4.0)))
        values.update(zip(further, numbers[5:]))
        late = () if tuner.late_until_scale and count > 1 else tuner.late_sums
        sums = {name: torch.tensor(values[name], dtype=torch.float64) for name in (*tuner.sums, *late)}
        state.commit(tuner.propose(state.tensor, sums))
        assert state.tensor.isfinite().all()
        assert math.isfinite(state.scale)
        assert state.updates == count
        if not all(math.isfinite(values[name]) for name in ("grad_square", "x_square") if name in sums):
            rows, was = tuner.rows(state.tensor), tuner.rows(before)
            assert all(torch.equal(rows[name], was[name]) for name in tuner.fields)
            assert state.nonfinite == was["nonfinite"][0] + 1


def test_refuses_bad_options() -> None:
    parameters, _ = problem()
    base = torch.optim.SGD(parameters, lr=1.0)
    with pytest.raises(ValueError, match="nonfinite must be one of"):
        Mechanic(base, nonfinite="hope", variant="optax")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="check_every must be"):
        Mechanic(base, check_every=-1, variant="optax")
    with pytest.raises(ValueError, match="s_max must be positive, finite and at least"):
        Mechanic(base, s_init=1e-3, s_max=1e-4, variant="optax")
