"""Properties of base optimizers' updates, and the names in torch that they are read from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from manic.optimizer.kinds import decay_is_decoupled, is_elementwise, is_proportional, largest_lr, resolve_update


def base(cls: type[torch.optim.Optimizer], **options: object) -> torch.optim.Optimizer:
    return cls([torch.ones(2, 2, requires_grad=True)], **{"lr": 1.0, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_torch_has_the_attributes_of_step_hooks(kind: str) -> None:
    optimizer = base(torch.optim.SGD)
    assert is_proportional(optimizer)
    handle = getattr(optimizer, f"register_step_{kind}_hook")(lambda *_: None)
    assert not is_proportional(optimizer)
    handle.remove()
    assert is_proportional(optimizer)


@pytest.mark.parametrize("register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook])
def test_torch_has_the_attributes_of_step_hooks_of_all_optimizers(register: Callable[..., Any]) -> None:
    optimizer = base(torch.optim.SGD)
    handle = register(lambda *_: None)
    try:
        assert not is_elementwise(optimizer)
    finally:
        handle.remove()
    assert is_elementwise(optimizer)


def test_which_steps_are_elementwise() -> None:
    class Mine(torch.optim.SGD):
        pass

    names = ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop", "Adadelta", "Rprop", "ASGD"]
    assert all(is_elementwise(base(getattr(torch.optim, name))) for name in names)
    others = [base(cls) for cls in (torch.optim.Adafactor, torch.optim.Muon, torch.optim.LBFGS, Mine)]
    others += [base(torch.optim.Adam, differentiable=True), base(torch.optim.SGD)]
    others[-1].register_step_pre_hook(lambda *_: None)
    assert not any(map(is_elementwise, others))


def test_a_replaced_step_may_do_anything_but_a_scheduler_only_counts() -> None:
    optimizer = base(torch.optim.SGD)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert "step" in vars(optimizer)
    assert is_elementwise(optimizer)
    optimizer.step = lambda closure=None: None  # type: ignore[method-assign, assignment]
    assert not is_elementwise(optimizer)


def test_detects_updates_not_linear_in_the_learning_rate() -> None:
    class Mine(torch.optim.SGD):
        pass

    for optimizer in (base(torch.optim.Rprop), base(torch.optim.ASGD), base(torch.optim.Adafactor), base(Mine)):
        assert not is_proportional(optimizer)


def test_kind_of_weight_decay_is_per_group() -> None:
    assert resolve_update(base(torch.optim.NAdam), "auto") == "by group"
    assert decay_is_decoupled("by group", {"decoupled_weight_decay": True})
    assert not decay_is_decoupled("by group", {})
    assert decay_is_decoupled("decoupled", {})
    assert not decay_is_decoupled("coupled", {"decoupled_weight_decay": True})


def test_the_largest_learning_rate() -> None:
    assert largest_lr([]) is None
    assert largest_lr([{}]) == 1.0
    assert largest_lr([{"lr": 0.5}, {"lr": torch.tensor(0.75)}]) == 0.75
