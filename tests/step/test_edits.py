"""Parameters that are changed between two steps, outside the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from manic import Mechanic
from support.problems import problem

Edit = Callable[[list[Tensor]], None]


def clip(parameters: list[Tensor]) -> None:
    for p in parameters:
        p.clamp_(-0.2, 0.2)


def load_another_model(parameters: list[Tensor]) -> None:
    for index, p in enumerate(parameters):
        p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(index), dtype=p.dtype))


def merge_an_adapter(parameters: list[Tensor]) -> None:
    for p in parameters:
        p.add_(torch.outer(torch.linspace(-0.1, 0.1, p.shape[0]), torch.ones(p.shape[1])))


def exchange_storage(parameters: list[Tensor]) -> None:
    for p in parameters:
        p.data = p.data * 0.5  # as frameworks that swap weights do


EDITS: list[Edit] = [clip, load_another_model, merge_an_adapter, exchange_storage]


def train(optimizer: Mechanic, loss: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()


def edited(edit: Edit, **options: Any) -> tuple[list[Tensor], Any, Mechanic, list[Tensor]]:
    """Train, edit, and return the edited values of the parameters last."""
    parameters, loss = problem()
    optimizer = Mechanic(torch.optim.AdamW(parameters, lr=1.0), s_init=1e-3, **{"variant": "optax", **options})
    train(optimizer, loss, range(8))
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        edit(parameters)
    after = [p.detach().clone() for p in parameters]
    assert min(float((a - b).abs().max()) for a, b in zip(after, before)) > 0.05
    return parameters, loss, optimizer, after


@pytest.mark.parametrize("edit", EDITS)
def test_the_next_step_reverts_an_edit(edit: Edit) -> None:
    parameters, loss, optimizer, _ = edited(edit)
    with pytest.raises(RuntimeError, match=r"2 of 2 parameters are not x_ref .*call rebase\(\)"):
        optimizer.check_consistency()
    train(optimizer, loss, range(8, 9))
    for p in parameters:
        state = optimizer.state[p]
        expected = state["mechanic_x_ref"] + optimizer.scale * state["mechanic_delta"]
        torch.testing.assert_close(p.detach(), expected, rtol=1e-14, atol=1e-14)
    optimizer.check_consistency()


@pytest.mark.parametrize(
    "options", [{}, {"store_delta": False}, {"variant": "pytorch"}, {"variant": "multiplicative"}], ids=str
)
@pytest.mark.parametrize("edit", EDITS)
def test_rebase_continues_from_an_edit(edit: Edit, options: dict[str, Any]) -> None:
    parameters, loss, optimizer, after = edited(edit, **options)
    scale = optimizer.scale
    optimizer.rebase()
    assert optimizer.scale == scale
    optimizer.check_consistency()
    for p, x in zip(parameters, after):
        references = [value for name, value in optimizer.state[p].items() if name.startswith("mechanic_x_ref")]
        assert references
        assert all(torch.equal(reference, x) for reference in references)
    train(optimizer, loss, range(8, 9))
    for p, x in zip(parameters, after):
        assert 0 < float((p.detach() - x).abs().max()) < 3 * float(optimizer.scale)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_kept_without_a_stored_delta(edit: Edit) -> None:
    parameters, loss, optimizer, after = edited(edit, store_delta=False)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    scale = optimizer.scale
    train(optimizer, loss, range(8, 9))
    growth = float(optimizer.scale / scale)
    for p, x in zip(parameters, after):
        x_ref = optimizer.state[p]["mechanic_x_ref"]
        torch.testing.assert_close(p.detach(), x_ref + growth * (x - x_ref), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"variant": "pytorch"}], ids=str)
def test_an_edit_and_an_error_in_the_same_step_do_not_spoil_the_scale(options: dict[str, Any]) -> None:
    parameters, loss = problem()
    base = torch.optim.AdamW(parameters, lr=1.0)
    optimizer = Mechanic(base, **{"variant": "optax", **options})
    train(optimizer, loss, range(3))
    with torch.no_grad():
        clip(parameters)
    step = base.step

    def step_and_fail() -> None:
        step()
        raise OSError("out of luck")

    base.step = step_and_fail  # type: ignore[assignment, method-assign]
    with pytest.raises(OSError, match="out of luck"):
        train(optimizer, loss, range(3, 4))
    base.step = step  # type: ignore[method-assign]
    train(optimizer, loss, range(4, 60))
    assert optimizer.scale > 1e-3


@pytest.mark.parametrize(
    "options", [{}, {"store_delta": False}, {"variant": "pytorch"}, {"variant": "multiplicative"}], ids=str
)
def test_swapping_an_average_in_and_out_changes_nothing(options: dict[str, Any]) -> None:
    runs = []
    for swaps in (False, True):
        parameters, loss = problem()
        optimizer = Mechanic(torch.optim.AdamW(parameters, lr=1.0), s_init=1e-3, **{"variant": "optax", **options})
        for step in range(12):
            train(optimizer, loss, range(step, step + 1))
            if swaps:
                with torch.no_grad():
                    kept = [p.detach().clone() for p in parameters]
                    load_another_model(parameters)
                    for p, x in zip(parameters, kept):
                        p.copy_(x)
        runs.append([p.detach().clone() for p in parameters])
    for a, b in zip(*runs):
        assert torch.equal(a, b)
