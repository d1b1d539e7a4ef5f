"""Every fault in every layout and on every rank: all ranks react equally, and the step is rolled back."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist

from manic import Mechanic
from manic.distributed.layout import local
from manic.testing import run
from support.failing import FailingTuner, FailsAt
from support.fault_cases import ERRORS, GRADIENTS, LAYOUTS, NO_PIPELINE, Gradient, quick_first
from support.layouts import Setup, setup
from support.snapshots import backward, differing, everyone, everything, take_steps
from support.tuners import rows_of

BEFORE, AFTER = 3, 3
"""Steps before and after the one with the fault."""


def poison(prepared: Setup, value: float) -> bool:
    """Set an element of one of this rank's gradients to ``value``; return False if it has none."""
    for group in prepared.mechanic.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and local(parameter.grad).numel():
                local(parameter.grad.detach()).view(-1)[-1] = value
                return True
    return False


def gradient_fault(layout: str, rank: int, fault: Gradient) -> None:
    """On each rank, the run equals one without the step with the bad gradient."""
    options = {**dict(fault.options), "nonfinite": fault.nonfinite, "s_init": 1e-3}
    undisturbed = setup(layout, fault.base, torch.float64, **options)
    take_steps(undisturbed, 0, BEFORE)
    take_steps(undisturbed, BEFORE + 1, AFTER)
    expected = everything(undisturbed)

    prepared = setup(layout, fault.base, torch.float64, **options)
    take_steps(prepared, 0, BEFORE)
    backward(prepared, BEFORE)
    here = dist.get_rank() if dist.is_initialized() else 0
    poisoned = poison(prepared, fault.value) if here == rank else False
    assert any(everyone(poisoned)), "no rank has a gradient"
    before = everything(prepared)
    message = ""
    try:
        prepared.optimizer.step()
    except RuntimeError as error:
        message = str(error)
    after = everything(prepared)
    assert len(set(everyone(message))) == 1, "ranks raise different messages"
    if fault.nonfinite == "raise":
        assert f"step {BEFORE + 1} was not taken" in message, message
        assert f"rank {rank}: 1 of " in message, message
        assert differing(before, after) == []
    else:
        assert message == ""
        assert prepared.mechanic.metrics()["nonfinite_steps"] == 1
        rows_of(after["tuner"], options.get("variant", "optax"))["nonfinite"].zero_()
        assert differing(before, after) == []
    take_steps(prepared, BEFORE + 1, AFTER)
    found = everything(prepared)
    rows_of(found["tuner"], options.get("variant", "optax"))["nonfinite"].zero_()
    assert differing(expected, found) == [], "later steps differ from a run without the fault"


def error_fault(layout: str, rank: int, where: str) -> None:
    """An exception on one rank in a step: its parameters hold an iterate, and its settings are restored."""
    here = dist.get_rank() if dist.is_initialized() else 0
    tuner = FailingTuner(s_init=1e-3)
    # If the host waits for the sums, the tuner raises before the first change: see test_mechanic.py.
    nonfinite = "ignore" if where == "in the tuner" else "raise"
    prepared = setup(layout, "adamw", torch.float64, variant=tuner, nonfinite=nonfinite)
    take_steps(prepared, 0, BEFORE)
    backward(prepared, BEFORE)
    before = everything(prepared)
    mechanic = prepared.mechanic
    if here == rank:
        with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
            inject(mechanic, tuner, where, patch, stack)
            with pytest.raises(OSError, match="out of luck"):
                mechanic.step()  # not ZeRO's, whose broadcasts need all ranks
        after = everything(prepared)
        changed = differing(before, after)
        own = [name for name in changed if not name.startswith(("exp_avg", "step"))]
        if where == "before the base optimizer's step":
            assert changed == []
        else:  # AdamW has updated Delta: x has that displacement at the old scale
            assert all(name.startswith(("mechanic_delta", "parameter")) for name in own), own
            assert own, "the base optimizer has changed nothing: the test is void"
            assert_at_the_old_scale(mechanic, before)
    else:
        mechanic.step()
        assert torch.isfinite(mechanic.scale)


@torch.no_grad()
def assert_at_the_old_scale(mechanic: Any, before: dict[str, Any]) -> None:
    scale = rows_of(before["tuner"])["s"].sum()
    for group in mechanic.param_groups:
        for parameter in group["params"]:
            state = mechanic.state.get(parameter, {})
            if "mechanic_delta" in state:
                right = local(state["mechanic_x_ref"]) + scale * local(state["mechanic_delta"])
                torch.testing.assert_close(local(parameter), right, rtol=1e-14, atol=1e-14)


def inject(
    mechanic: Mechanic, tuner: FailingTuner, where: str, patch: pytest.MonkeyPatch, stack: contextlib.ExitStack
) -> None:
    error = OSError("out of luck")
    base = mechanic.optimizers[0]
    step = base.step

    def fail(*_: Any) -> None:
        raise error

    def step_and_fail(*_: Any) -> None:
        step()
        fail()

    def step_and_fail_later(*_: Any) -> None:
        step()
        stack.enter_context(FailsAt(1, error, "addcmul"))

    if where == "in the tuner":
        tuner.error = error
    else:
        patch.setattr(base, "step", {
            "before the base optimizer's step": fail,
            "after it": step_and_fail,
            "while parameters are written": step_and_fail_later,
        }[where])  # fmt: skip


def on_each_rank(case: str, layout: str, fault: Any) -> int:
    """Called on every rank: inject the fault on one rank after the other."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    for rank in range(world_size):
        {"gradient": gradient_fault, "error": error_fault}[case](layout, rank, fault)
    return world_size


@pytest.mark.parametrize(("layout", "world_size", "fault"), quick_first(LAYOUTS, GRADIENTS), ids=str)
def test_injected_nonfinite_gradients(layout: str, world_size: int, fault: Gradient) -> None:
    assert run(on_each_rank, world_size, "gradient", layout, fault) == [world_size] * world_size


@pytest.mark.parametrize(("layout", "world_size", "where"), quick_first(NO_PIPELINE, list(ERRORS)), ids=str)
def test_injected_errors_in_a_step(layout: str, world_size: int, where: str) -> None:
    assert run(on_each_rank, world_size, "error", layout, where) == [world_size] * world_size
