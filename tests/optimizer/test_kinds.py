"""Properties of base optimizers' updates, and the names in torch that they are read from."""

from __future__ import annotations

import pytest
import torch

from manic.optimizer.kinds import decay_is_decoupled, is_proportional, largest_lr, resolve_update


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
