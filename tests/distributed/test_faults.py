"""Every fault in every layout and on every rank: all ranks act alike, and nothing of the step is left behind."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from layouts import BATCH, Setup, batch, setup
from manic.distributed.layout import local
from manic.testing import run

LAYOUTS = [
    ("single", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4), ("tp", 2), ("tp+fsdp2", 4), ("mixed", 4),
    ("fsdp1-orig", 2), ("fsdp1-flat", 2), ("fsdp1-hybrid", 4), ("zero1", 2), ("pipeline", 2),
]  # fmt: skip
# What the default suite tries; the rest is slow.
QUICK = {("ddp", 2), ("fsdp2", 3), ("tp+fsdp2", 4), ("fsdp1-orig", 2), ("zero1", 2)}
BEFORE, AFTER = 3, 3
"""Steps before and after the one in which the fault is."""


@dataclass(frozen=True)
class Gradient:
    """One element of one rank's gradients is not finite."""

    value: float
    nonfinite: str
    options: tuple[tuple[str, Any], ...] = ()
    base: str = "adamw"

    def __str__(self) -> str:
        return "-".join(
            [f"{self.value}", self.nonfinite, *(f"{key}={value}" for key, value in self.options), self.base]
        )


GRADIENTS = [
    Gradient(math.nan, "raise"),
    Gradient(math.inf, "skip"),
    Gradient(-math.inf, "raise", (("store_delta", False),)),
    Gradient(math.nan, "skip", (("variant", "pytorch"),)),
    Gradient(math.nan, "skip", (("update", "snapshot"),), "sgd"),
    Gradient(math.nan, "skip", (("variant", "multiplicative"),)),
]
ERRORS = ("before the base optimizer's step", "after it", "in the tuner", "while parameters are written")


# A pipeline's ranks go on to exchange activations, here by broadcasts: one that stops alone is another test's subject.
NO_PIPELINE = [layout for layout in LAYOUTS if layout[0] != "pipeline"]


def quick_first(layouts: list[tuple[str, int]], values: list[Any]) -> list[Any]:
    """All layouts with each value, of which those not in QUICK, or not of the first two values, are slow."""
    return [
        pytest.param(*layout, value, marks=() if layout in QUICK and values.index(value) < 2 else pytest.mark.slow)
        for layout, value in itertools.product(layouts, values)
    ]


def tried(quick: bool = False) -> dict[str, int]:
    """How many faults are tried in all, or in the default suite: each on every rank."""
    parameters = {"gradients": quick_first(LAYOUTS, GRADIENTS), "errors": quick_first(NO_PIPELINE, list(ERRORS))}
    return {
        name: sum(each.values[1] for each in cases if not (quick and each.marks)) for name, cases in parameters.items()
    }


def backward(prepared: Setup, step: int) -> None:
    x, y = batch(step, torch.float64)
    share = BATCH // prepared.data_size
    part = slice(prepared.data_rank * share, (prepared.data_rank + 1) * share)
    prepared.optimizer.zero_grad()
    (prepared.model(x[part]) - y[part]).square().mean().backward()


def take_steps(prepared: Setup, first: int, number: int) -> None:
    for step in range(first, first + number):
        backward(prepared, step)
        prepared.optimizer.step()


@torch.no_grad()
def everything(prepared: Setup) -> dict[str, Any]:
    """All that a step changes, on this rank, and the settings that it changes for a while."""
    mechanic = prepared.mechanic
    found: dict[str, Any] = {"tuner": mechanic._tuner.state.clone(), "grad mode": torch.is_grad_enabled()}
    for number, parameter in enumerate(prepared.model.parameters()):
        found[f"parameter {number}"] = local(parameter).clone()
    for index, group in enumerate(mechanic.param_groups):
        found[f"group {index}"] = copy.deepcopy({k: v for k, v in group.items() if k not in ("params", "mechanic")})
        for place, parameter in enumerate(group["params"]):
            for key, value in mechanic.state.get(parameter, {}).items():
                tensor = local(value).clone() if isinstance(value, Tensor) else value
                found[f"{key} of parameter {place} in group {index}"] = tensor
    return found


def differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) else a == b

    keys = first.keys() | second.keys()
    return sorted(key for key in keys if key not in first or key not in second or not same(first[key], second[key]))


def poison(prepared: Setup, value: float) -> bool:
    """Put ``value`` into one of this rank's gradients; False if it has none."""
    for group in prepared.mechanic.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and local(parameter.grad).numel():
                local(parameter.grad.detach()).view(-1)[-1] = value
                return True
    return False


def everyone(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gradient_fault(layout: str, rank: int, fault: Gradient) -> None:
    """On each rank: the step with the bad gradient never happened."""
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
    assert any(everyone(poisoned)), "no rank has a gradient to spoil"
    before = everything(prepared)
    message = ""
    try:
        prepared.optimizer.step()
    except RuntimeError as error:
        message = str(error)
    after = everything(prepared)
    assert len(set(everyone(message))) == 1, "ranks say different things"
    if fault.nonfinite == "raise":
        assert f"step {BEFORE + 1} was not taken" in message, message
        assert f"rank {rank}: 1 of " in message, message
        assert differing(before, after) == []
    else:
        assert message == ""
        assert prepared.mechanic.metrics()["nonfinite_steps"] == 1
        after["tuner"][7] = 0
        assert differing(before, after) == []
    take_steps(prepared, BEFORE + 1, AFTER)
    found = everything(prepared)
    found["tuner"][7] = 0
    assert differing(expected, found) == [], "the steps after it are not those of a run without it"


def error_fault(layout: str, rank: int, where: str) -> None:
    """On one rank, an exception in mid-step: there, parameters hold an iterate, and all that was set is put back."""
    here = dist.get_rank() if dist.is_initialized() else 0
    prepared = setup(layout, "adamw", torch.float64, s_init=1e-3)
    take_steps(prepared, 0, BEFORE)
    backward(prepared, BEFORE)
    before = everything(prepared)
    mechanic = prepared.mechanic
    if here == rank:
        with pytest.MonkeyPatch.context() as patch:
            inject(mechanic, where, patch)
            with pytest.raises(OSError, match="out of luck"):
                mechanic.step()  # not ZeRO's, whose broadcasts need all ranks
        after = everything(prepared)
        changed = differing(before, after)
        own = [name for name in changed if not name.startswith(("exp_avg", "step"))]
        if where == "before the base optimizer's step":
            assert changed == []
        else:  # AdamW has stepped, on Delta: x is moved by that, at the scale as it was
            assert all(name.startswith(("mechanic_delta", "parameter")) for name in own), own
            assert own, "the base optimizer has done nothing: the test shows nothing"
            assert_at_the_old_scale(mechanic, before)
    else:
        mechanic.step()
        assert torch.isfinite(mechanic.scale)


@torch.no_grad()
def assert_at_the_old_scale(mechanic: Any, before: dict[str, Any]) -> None:
    scale = before["tuner"][3].sum()
    for group in mechanic.param_groups:
        for parameter in group["params"]:
            state = mechanic.state.get(parameter, {})
            if "mechanic_delta" in state:
                right = local(state["mechanic_x_ref"]) + scale * local(state["mechanic_delta"])
                torch.testing.assert_close(local(parameter), right, rtol=1e-14, atol=1e-14)


def inject(mechanic: Any, where: str, patch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("out of luck")

    base = mechanic.optimizers[0]
    if where == "before the base optimizer's step":
        patch.setattr(base, "step", fail)
    elif where == "after it":
        step = base.step

        def step_and_fail(*_: Any) -> None:
            step()
            fail()

        patch.setattr(base, "step", step_and_fail)
    elif where == "in the tuner":
        patch.setattr(mechanic._tuner, "update", fail)
    elif where == "while parameters are written":
        patch.setattr("manic.mechanic.write_back", fail)  # called with what the tuner has made of the sums
    else:
        raise AssertionError(where)


def on_each_rank(case: str, layout: str, fault: Any) -> int:
    """Called on every rank: the fault on one rank after the other."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    for rank in range(world_size):
        {"gradient": gradient_fault, "error": error_fault}[case](layout, rank, fault)
    return world_size


@pytest.mark.parametrize(("layout", "world_size", "fault"), quick_first(LAYOUTS, GRADIENTS), ids=str)
def test_a_gradient_that_is_not_finite(layout: str, world_size: int, fault: Gradient) -> None:
    assert run(on_each_rank, world_size, "gradient", layout, fault) == [world_size] * world_size


@pytest.mark.parametrize(("layout", "world_size", "where"), quick_first(NO_PIPELINE, list(ERRORS)), ids=str)
def test_an_error_in_the_middle_of_a_step(layout: str, world_size: int, where: str) -> None:
    assert run(on_each_rank, world_size, "error", layout, where) == [world_size] * world_size
