"""Mechanic is a torch.optim.Optimizer: schedulers, hooks, closures, copies, groups and metrics."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

from manic import Mechanic, mechanize
from manic.tuners.registry import TUNERS
from support.problems import problem
from support.training import adamw, assert_identical, tensors, train


@pytest.mark.parametrize("held", ["wrapper", "base"])
def test_schedulers_drive_it_before_and_after_a_load(held: str) -> None:
    parameters, loss = problem()
    base = adamw(parameters)
    optimizer = Mechanic(base, variant="optax")
    scheduler = CosineAnnealingLR(optimizer if held == "wrapper" else base, T_max=10)
    loss(0).backward()
    optimizer.step()
    scheduler.step()
    assert base.param_groups is optimizer.param_groups
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.2)))
    assert base.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_other_schedulers() -> None:
    parameters, _ = problem()
    LambdaLR(Mechanic(adamw(parameters), variant="optax"), lambda step: 1.0)
    OneCycleLR(Mechanic(adamw(parameters), variant="optax"), max_lr=1.0, total_steps=10)
    ReduceLROnPlateau(Mechanic(adamw(parameters), variant="optax")).step(1.0)


def test_step_hooks_run_once() -> None:
    parameters, loss = problem()
    optimizer = mechanize(torch.optim.SGD, variant="optax")(parameters, lr=1.0)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    loss(0).backward()
    optimizer.step()
    assert calls == ["before", "after"]


def test_zero_grad() -> None:
    parameters, loss = problem()
    optimizer = Mechanic(adamw(parameters), variant="optax")
    loss(0).backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in parameters if p.grad is not None)
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters)


def test_add_param_group() -> None:
    parameters, loss = problem()
    optimizer = Mechanic(adamw(parameters[:1]), s_init=1e-2, variant="optax")
    train(optimizer, loss, 5)
    optimizer.add_param_group({"params": parameters[1:], "lr": 0.5})
    before = parameters[1].detach().clone()
    train(optimizer, loss, 1, start=5)
    assert torch.equal(optimizer.state[parameters[1]]["mechanic_x_ref"], before)
    assert len(optimizer.metrics()) == 7
    train(optimizer, loss, 5, start=6)
    assert not torch.equal(parameters[1].detach(), before)


def test_add_param_group_with_several_bases_is_refused() -> None:
    parameters, loss = problem()
    extra = torch.ones(3, dtype=torch.float64, requires_grad=True)
    bases = [torch.optim.SGD(parameters[:1], lr=1.0), adamw(parameters[1:])]
    optimizer = Mechanic(bases, variant="optax")
    with pytest.raises(ValueError, match="SGD, AdamW"):
        optimizer.add_param_group({"params": [extra]})
    bases[0].add_param_group({"params": [extra]})
    train(optimizer, lambda step: loss(step) + extra.sum(), 3)
    assert "mechanic_x_ref" in optimizer.state[extra]


def test_refuses_a_parameter_added_twice() -> None:
    parameters, loss = problem()
    bases = [torch.optim.SGD(parameters[:1], lr=1.0), adamw(parameters[1:])]
    optimizer = Mechanic(bases, variant="optax")
    bases[0].add_param_group({"params": parameters[1:]})
    loss(0).backward()
    with pytest.raises(ValueError, match="more than one group"):
        optimizer.step()


def test_repr_names_bases_and_settings_but_not_tensors() -> None:
    parameters, _ = problem()
    text = repr(Mechanic([torch.optim.SGD(parameters[:1], lr=1.0), adamw(parameters[1:])], s_init=0.5, variant="optax"))
    assert "Mechanic(SGD, AdamW" in text
    assert "s_init=0.5" in text
    assert "weight_decay: 0.1" in text
    assert "tensor" not in text


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("bases", ["one", "two", "mechanized"])
@pytest.mark.parametrize("variant", TUNERS)
def test_copies_continue_like_the_original(variant: str, bases: str, how: str) -> None:
    parameters, loss = problem()
    if bases == "one":
        optimizer = Mechanic(adamw(parameters), variant=variant)
    elif bases == "two":
        optimizer = Mechanic(
            [torch.optim.SGD(parameters[:1], lr=1.0, momentum=0.9), adamw(parameters[1:])], variant=variant
        )
    else:
        optimizer = mechanize(torch.optim.AdamW, s_init=1e-3, variant=variant)(parameters, lr=1.0)
    CosineAnnealingLR(optimizer, T_max=10)  # replaces the object's step
    train(optimizer, loss, 5)
    twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    twin_parameters = [p for group in twin.param_groups for p in group["params"]]
    assert not {id(p) for p in twin_parameters} & {id(p) for p in parameters}
    for step in range(5, 10):
        loss(step).backward()
        for p, q in zip(parameters, twin_parameters):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        twin.step()
        optimizer.zero_grad()
    assert twin.scale == optimizer.scale
    assert_identical(tensors(twin_parameters), tensors(parameters))


def test_grad_scaler_unscales_first_and_skips_overflow() -> None:
    assert not getattr(Mechanic(adamw(problem()[0], fused=True), variant="optax"), "_step_supports_amp_scaling", False)
    plain_parameters, loss = problem(torch.float32)
    plain = Mechanic(adamw(plain_parameters, fused=True), s_init=1e-3, variant="optax")
    train(plain, loss, 10)
    parameters, loss = problem(torch.float32)
    optimizer = Mechanic(adamw(parameters, fused=True), s_init=1e-3, variant="optax")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    for step in range(10):
        optimizer.zero_grad()
        scaler.scale(loss(step)).backward()
        if step == 5:  # an overflow, and then the same batch again
            kept = [p.grad.clone() for p in parameters if p.grad is not None]
            before = tensors(parameters)
            parameters[0].grad.fill_(math.inf)
            scaler.step(optimizer)
            assert_identical(tensors(parameters), before)
            scaler.update(2.0**10)
            for p, gradient in zip(parameters, kept):
                p.grad = gradient
        scaler.step(optimizer)
        scaler.update(2.0**10)
    assert optimizer.scale.item() == pytest.approx(plain.scale.item(), rel=1e-4)
    for a, b in zip(parameters, plain_parameters):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", TUNERS)
def test_metrics_are_scalars_of_the_whole_model(variant: str) -> None:
    parameters, loss = problem()
    optimizer = Mechanic(adamw(parameters), s_init=1e-3, variant=variant)
    assert optimizer.metrics()["h"].isnan()
    train(optimizer, loss, 3)
    optimizer.zero_grad()
    loss(3).backward()
    norm = torch.cat([p.detach().ravel() for p in parameters]).norm()
    gradient = torch.cat([p.grad.ravel() for p in parameters if p.grad is not None]).norm()
    optimizer.step()
    metrics = optimizer.metrics()
    assert all(isinstance(v, Tensor) and v.ndim == 0 for v in metrics.values())
    if "x_square" not in TUNERS[variant].late_sums:  # else the base optimizer has moved x
        assert metrics["param_norm"].item() == pytest.approx(norm.item(), rel=1e-12)
    assert metrics["grad_norm"].item() == pytest.approx(gradient.item(), rel=1e-12)
    assert metrics["scale"] == optimizer.scale
    assert metrics["effective_lr/0"] == optimizer.scale
