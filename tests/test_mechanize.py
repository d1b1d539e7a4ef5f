"""mechanize makes a class of a base optimizer, as mechanic-pytorch does."""

from __future__ import annotations

from typing import Any

import torch

from manic import Mechanic, is_mechanized, mechanize
from support.problems import problem
from support.training import adamw, assert_identical, tensors, train


def test_is_the_wrapper_as_a_class() -> None:
    parameters, loss = problem()
    cls = mechanize(torch.optim.SGD, s_init=1e-3, variant="optax")
    optimizer = cls(parameters, lr=1.0, momentum=0.9)
    twin_parameters, twin_loss = problem()
    twin = Mechanic(torch.optim.SGD(twin_parameters, lr=1.0, momentum=0.9), s_init=1e-3, variant="optax")
    train(optimizer, loss, 10)
    train(twin, twin_loss, 10)
    assert cls.__name__ == "MechanizedSGD"
    assert optimizer.scale == twin.scale
    assert_identical(tensors(parameters), tensors(twin_parameters))


def test_is_mechanized() -> None:
    parameters, _ = problem()
    assert is_mechanized(mechanize(torch.optim.SGD, variant="optax")(parameters, lr=1.0))
    assert is_mechanized(Mechanic(adamw(parameters), variant="optax"))
    assert not is_mechanized(adamw(parameters))


def test_logs_every_n_steps() -> None:
    parameters, loss = problem()
    seen: list[dict[str, Any]] = []
    optimizer = mechanize(torch.optim.SGD, log_func=seen.append, log_every=3, variant="optax")(parameters, lr=1.0)
    train(optimizer, loss, 7)
    assert [record["iter_count"] for record in seen] == [3, 6]
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, loss, 2, start=7)
    assert seen[-1]["iter_count"] == 9
    assert all(isinstance(record["s"], float) for record in seen)
