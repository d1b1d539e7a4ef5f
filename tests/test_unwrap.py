"""unwrap finds the Mechanic inside what frameworks put around an optimizer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

import manic
from manic import Mechanic, unwrap
from support.problems import problem
from support.training import adamw, train


def wrapped(how: str, mechanic: Mechanic) -> Any:
    """In the form that a framework keeps it: by an attribute, some of them in turn."""
    return {
        "itself": mechanic,
        "optimizer": SimpleNamespace(optimizer=mechanic),
        "_optimizer": SimpleNamespace(_optimizer=mechanic),
        "optim": SimpleNamespace(optim=mechanic),
        "optimizers": SimpleNamespace(optimizers=[mechanic]),
        "list": [torch.optim.SGD([torch.ones(1, requires_grad=True)]), mechanic],
        "dict": {"generator": mechanic},
        "twice": SimpleNamespace(optimizer=SimpleNamespace(optimizer=mechanic, optim=mechanic)),
        "scheduler": CosineAnnealingLR(mechanic, T_max=3),
        "method": SimpleNamespace(optimizers=lambda: None, optimizer=mechanic),
    }[how]


@pytest.mark.parametrize("how", [
    "itself", "optimizer", "_optimizer", "optim", "optimizers", "list", "dict", "twice", "scheduler", "method",
])  # fmt: skip
def test_finds_the_mechanic(how: str) -> None:
    mechanic = Mechanic(adamw(problem()[0]))
    assert unwrap(wrapped(how, mechanic)) is mechanic


def test_finds_what_wraps_itself() -> None:
    loop = SimpleNamespace(optimizer=None)
    loop.optimizer = loop
    with pytest.raises(TypeError, match=r"no manic\.Mechanic in SimpleNamespace"):
        unwrap(loop)


def test_says_that_there_is_none() -> None:
    with pytest.raises(TypeError, match=r"no manic\.Mechanic in AdamW"):
        unwrap(adamw(problem()[0]))


def test_says_that_there_are_several() -> None:
    first, second = problem()[0]
    with pytest.raises(ValueError, match="2 Mechanics in list"):
        unwrap([manic.AdamW([first]), manic.AdamW([second])])


def test_metrics_on_the_host_are_the_same_as_floats() -> None:
    parameters, loss = problem()
    optimizer = manic.AdamW([{"params": [p]} for p in parameters], scale="per group")
    train(optimizer, loss, 3)
    on_host = optimizer.metrics(to_host=True)
    assert all(type(value) is float for value in on_host.values())
    assert on_host == {name: float(value) for name, value in optimizer.metrics().items()}
