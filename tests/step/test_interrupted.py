"""A step that fails at any of its operators rolls back parameters, tuner and settings."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import manic
from manic import Mechanic
from manic.step import chunks
from support.failing import EVERY, FailsAt, operators
from support.tuners import rows_of, state_of

BASES = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=1.0, weight_decay=0.1, foreach=False),
    "AdamW, foreach": lambda ps: torch.optim.AdamW(ps, lr=1.0, weight_decay=0.1, foreach=True),
    "AdamW, fused": lambda ps: torch.optim.AdamW(ps, lr=1.0, weight_decay=0.1, fused=True),
    "SGD, coupled decay": lambda ps: torch.optim.SGD(ps, lr=1.0, momentum=0.9, weight_decay=0.1, foreach=False),
}
OPTIONS = [
    {}, {"nonfinite": "ignore"}, {"update": "snapshot"}, {"store_delta": False},
    {"store_delta": False, "nonfinite": "ignore"}, {"variant": "pytorch"}, {"update": "decoupled"},
    {"variant": "multiplicative"}, {"variant": "multiplicative", "nonfinite": "skip"},
]  # fmt: skip
CASES = [
    pytest.param(
        base, options, dtype,
        marks=pytest.mark.slow if "foreach" in base or (dtype, base) == (torch.bfloat16, "AdamW, fused") else (),
    )
    for base in BASES
    for options in OPTIONS
    for dtype in (torch.float64, torch.bfloat16)
    if dtype == torch.float64 or "store_delta" not in options
    if base != "SGD, coupled decay" or "update" not in options
]  # fmt: skip


def make(base: str, options: dict[str, Any], dtype: torch.dtype, steps: int = 3) -> tuple[list[Tensor], Mechanic]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (), (6, 5), (40,)]  # the last is processed in pieces
    parameters = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    optimizer = Mechanic(BASES[base](parameters), s_init=1e-2, **{"variant": "optax", **options})
    for step in range(steps):
        set_gradients(parameters, step)
        optimizer.step()
    return parameters, optimizer


def set_gradients(parameters: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(10 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@EVERY
@pytest.mark.parametrize(("base", "options", "dtype"), CASES, ids=str)
def test_a_step_that_fails_at_any_operator_rolls_back(
    base: str, options: dict[str, Any], dtype: torch.dtype, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "SMALL", 10)  # the first two are batched, the others are single
    monkeypatch.setattr(chunks, "CPU_PIECE", 30)
    parameters, optimizer = make(base, options, dtype)
    set_gradients(parameters, 3)
    begins: list[int] = []
    base_step = optimizer.optimizers[0].step
    with FailsAt(None) as whole, monkeypatch.context() as patch:
        patch.setattr(optimizer.optimizers[0], "step", lambda: (begins.append(whole.count), base_step()))
        committed = count_until_commit(optimizer, whole, patch)
        optimizer.step()
    assert whole.count > 30
    moved_to, learned = [p.detach().clone() for p in parameters], state_of(optimizer).clone()

    rounding = 1e-12 if dtype == torch.float64 else 2**-7
    stored = options.get("store_delta", options.get("variant") != "multiplicative" or dtype == torch.bfloat16)
    for at in operators(whole.count, every, (base, options, dtype)):
        parameters, optimizer = make(base, options, dtype)
        before = [p.detach().clone() for p in parameters]
        tuner = state_of(optimizer).clone()
        names = {p: set(optimizer.state[p]) for p in parameters}
        set_gradients(parameters, 3)
        gradients = [p.grad for p in parameters]
        with pytest.raises(MemoryError), FailsAt(at) as mode:
            optimizer.step()
        where = f"operator {at} of {whole.count}, {mode.failed_in}"

        is_taken = at > committed[0]
        assert torch.equal(state_of(optimizer), learned if is_taken else tuner), where
        assert torch.is_grad_enabled()
        assert optimizer.param_groups[0]["weight_decay"] == 0.1, where
        assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], parameters)), where
        assert [p.grad for p in parameters] == gradients or all(p.grad is g for p, g in zip(parameters, gradients))
        assert {p: set(optimizer.state[p]) for p in parameters} == names, where
        if is_taken:
            assert_equal(parameters, moved_to, where)
        for p, x, after in zip(parameters, before, moved_to):
            if at <= begins[0] and stored:
                assert torch.equal(p.detach(), x), where
            # If Delta has the update, x has that displacement at the old scale.
            bound = 2.0 * float((after - x).abs().max()) + 1e-9
            if options.get("variant") == "multiplicative":  # the base step may have applied only its decay
                bound += 0.2 * float(optimizer.scale * x.abs().max())
            torch.testing.assert_close(p.detach(), x, rtol=rounding, atol=bound, msg=where)
        if stored:
            optimizer.check_consistency()  # Delta matches the parameters
        set_gradients(parameters, 3)
        optimizer.step()
        optimizer.check_consistency()
        if at <= begins[0] and stored:
            assert_equal(parameters, moved_to, where)


@pytest.mark.parametrize(("base", "options"), [
    ("AdamW", {}), ("AdamW, fused", {"nonfinite": "ignore"}), ("SGD, coupled decay", {"store_delta": False}),
    ("AdamW", {"update": "snapshot"}), ("AdamW", {"variant": "pytorch"}), ("AdamW", {"variant": "multiplicative"}),
], ids=str)  # fmt: skip
@EVERY
def test_a_first_step_that_fails_at_any_operator_leaves_no_state(
    base: str, options: dict[str, Any], every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "SMALL", 10)
    undisturbed, optimizer = make(base, options, torch.float64, steps=0)
    set_gradients(undisturbed, 0)
    with FailsAt(None) as whole, monkeypatch.context() as patch:
        committed = count_until_commit(optimizer, whole, patch)
        optimizer.step()
    moved_to = [p.detach().clone() for p in undisturbed]
    for step in (1, 2):
        set_gradients(undisturbed, step)
        optimizer.step()
    for at in operators(whole.count, every, (base, options)):
        parameters, optimizer = make(base, options, torch.float64, steps=0)
        before = [p.detach().clone() for p in parameters]
        set_gradients(parameters, 0)
        with pytest.raises(MemoryError), FailsAt(at) as mode:
            optimizer.step()
        where = f"operator {at} of {whole.count}, {mode.failed_in}"
        if at > committed[0]:
            assert_equal(parameters, moved_to, where)
            optimizer.check_consistency()
            continue
        assert len(optimizer.state) == 0, where
        assert_equal(parameters, before, where)
        for step in range(3):
            set_gradients(parameters, step)
            optimizer.step()
        assert_equal(parameters, undisturbed, where)


def count_until_commit(optimizer: Mechanic, mode: FailsAt, patch: pytest.MonkeyPatch) -> list[int]:
    """A list to which the next step adds how many operators it needs until it is taken; references move after that."""
    counts: list[int] = []
    finish = optimizer._finish
    patch.setattr(optimizer, "_finish", lambda *args, **options: (counts.append(mode.count), finish(*args, **options)))
    return counts


def assert_equal(parameters: list[Tensor], others: list[Tensor], where: str) -> None:
    for p, q in zip(parameters, others):
        assert torch.equal(p.detach(), q.detach()), where


def test_an_error_in_the_closure_or_in_a_hook_before_a_step_changes_nothing() -> None:
    parameters, optimizer = make("AdamW", {}, torch.float64)
    before, tuner = [p.detach().clone() for p in parameters], state_of(optimizer).clone()

    def fail(*_: Any) -> None:
        raise MemoryError("out of luck")

    with pytest.raises(MemoryError):
        optimizer.step(fail)
    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(MemoryError):
        optimizer.step()
    handle.remove()
    handle = optimizer.optimizers[0].register_step_pre_hook(fail)
    with pytest.raises(MemoryError):
        optimizer.step()
    handle.remove()
    assert torch.equal(state_of(optimizer), tuner)
    assert torch.is_grad_enabled()
    for p, x in zip(parameters, before):
        assert torch.equal(p.detach(), x)


@pytest.mark.parametrize("options", [
    {}, pytest.param({"nonfinite": "ignore"}, marks=pytest.mark.slow), {"variant": "multiplicative"},
    pytest.param({"update": "snapshot"}, marks=pytest.mark.slow),
    pytest.param({"variant": "pytorch"}, marks=pytest.mark.slow),
    pytest.param({"variant": "multiplicative", "store_delta": True}, marks=pytest.mark.slow),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("steps", [0, 3])
def test_an_interrupt_at_any_line_leaves_tuner_and_parameters_of_one_step(steps: int, options: dict[str, Any]) -> None:
    """As Ctrl-C is raised between two lines of Python, where no operator fails."""
    source = str(Path(manic.__file__).parent)

    def lines(at: int | None) -> int:
        """Take a step, and raise at line number ``at`` of manic's code; returns how many lines there were."""
        parameters, optimizer = make("AdamW", options, torch.float64, steps=steps)
        before = [p.detach().clone() for p in parameters]
        set_gradients(parameters, steps)
        gradients = [p.grad for p in parameters]
        count, place = 0, list[str]()

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal count
            if not frame.f_code.co_filename.startswith(source):
                return None
            count += event == "line"
            if event == "line" and count == at:
                place.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            optimizer.step()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        where = f"line {at}: {place}"
        updates = int(rows_of(state_of(optimizer), options.get("variant", "optax"))["updates"][0])
        assert updates in (steps, steps + 1), where
        (group,) = optimizer.param_groups
        assert (group["lr"], group["weight_decay"]) == (1.0, 0.1), where
        assert all(p.grad is g and q is p for p, g, q in zip(parameters, gradients, group["params"])), where
        if updates == steps == 0:
            assert len(optimizer.state) == 0, where
            assert_equal(parameters, before, where)
        else:
            optimizer.check_consistency()
        return count

    whole = lines(None)
    assert whole > 200
    for at in range(1, whole + 1):
        lines(at)
