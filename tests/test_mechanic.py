"""A step of Mechanic, and what its constructor and its step refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manic import Mechanic, mechanize
from manic.step import chunks
from support.failing import FailingTuner, FailsAt
from support.problems import problem
from support.training import adamw, assert_identical, tensors, train


class TestStep:
    def test_lowers_the_loss_and_finds_a_scale(self) -> None:
        parameters, loss = problem()
        optimizer = Mechanic(adamw(parameters), variant="optax")
        before = loss(0).item()
        train(optimizer, loss, 200)
        assert loss(0).item() < 0.3 * before
        assert 1e-3 < optimizer.scale.item() < 1.0

    def test_parameters_are_x_ref_plus_scale_times_delta(self) -> None:
        parameters, loss = problem()
        start = tensors(parameters)
        optimizer = Mechanic(adamw(parameters), s_init=1e-2, variant="optax")
        train(optimizer, loss, 5)
        for parameter, first in zip(parameters, start):
            state = optimizer.state[parameter]
            assert torch.equal(state["mechanic_x_ref"], first)
            expected = first + optimizer.scale * state["mechanic_delta"]
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-14, atol=1e-14)

    def test_x_ref_is_taken_at_the_first_step(self) -> None:
        parameters, loss = problem()
        optimizer = Mechanic(adamw(parameters), variant="optax")
        with torch.no_grad():
            parameters[0].fill_(0.25)  # pretrained weights, loaded after construction
        train(optimizer, loss, 1)
        assert torch.equal(optimizer.state[parameters[0]]["mechanic_x_ref"], torch.full((6, 5), 0.25).double())

    def test_does_not_change_gradients(self) -> None:
        parameters, loss = problem()
        optimizer = Mechanic(torch.optim.SGD(parameters, lr=1.0, weight_decay=0.5), variant="optax")
        loss(0).backward()
        before = [p.grad.clone() for p in parameters if p.grad is not None]
        held = [p.grad for p in parameters if p.grad is not None]
        optimizer.step()
        for parameter, gradient, original in zip(parameters, before, held):
            assert parameter.grad is original
            assert torch.equal(original, gradient)

    def test_closure_runs_once_with_gradients_and_its_loss_is_returned(self) -> None:
        parameters, loss = problem()
        optimizer = Mechanic(adamw(parameters), variant="optax")
        calls = []

        def closure() -> Tensor:
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            value = loss(0)
            value.backward()
            return value

        with torch.no_grad():
            result = optimizer.step(closure)
        assert calls == [True]
        assert result is not None
        assert result.item() == pytest.approx(problem()[1](0).item())

    def test_several_optimizers_share_one_scale(self) -> None:
        parameters, loss = problem()
        joint = Mechanic(
            [torch.optim.AdamW(parameters[:1], lr=1.0), torch.optim.AdamW(parameters[1:], lr=1.0)], variant="optax"
        )
        train(joint, loss, 30)
        alone, alone_loss = problem()
        one = Mechanic(torch.optim.AdamW(alone, lr=1.0), variant="optax")
        train(one, alone_loss, 30)
        assert joint.scale.item() == pytest.approx(one.scale.item(), rel=1e-12)  # sums in another order
        for p, q in zip(tensors(parameters), tensors(alone)):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)

    def test_learning_rates_are_per_group_and_may_be_zero(self) -> None:
        parameters, loss = problem()
        start = tensors(parameters)
        groups = [{"params": parameters[:1], "lr": 0.0}, {"params": parameters[1:], "lr": 2.0}]
        optimizer = Mechanic(torch.optim.SGD(groups, lr=1.0), s_init=1e-3, variant="optax")
        train(optimizer, loss, 10)
        assert torch.equal(parameters[0].detach(), start[0])
        assert not torch.equal(parameters[1].detach(), start[1])
        metrics = optimizer.metrics()
        assert metrics["effective_lr/0"] == 0
        assert metrics["effective_lr/1"] == 2 * optimizer.scale

    @pytest.mark.parametrize("options", [{}, {"store_delta": False}], ids=str)
    def test_a_learning_rate_may_be_a_tensor(self, options: dict[str, Any]) -> None:
        results = []
        for lr in (0.5, torch.tensor(0.5)):
            parameters, loss = problem()
            optimizer = Mechanic(
                torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1), s_init=1e-3, **{"variant": "optax", **options}
            )
            train(optimizer, loss, 10)
            results.append(tensors(parameters))
        for p, q in zip(*results):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)

    def test_a_parameter_without_gradient_follows_the_scale_or_stays(self) -> None:
        for variant, follows in (("optax", True), ("pytorch", False)):
            parameters, loss = problem()
            optimizer = Mechanic(adamw(parameters), s_init=1e-3, variant=variant)
            train(optimizer, loss, 10)
            before = parameters[0].detach().clone()
            loss(10).backward()
            parameters[0].grad = None
            optimizer.step()
            state = optimizer.state[parameters[0]]
            expected = state["mechanic_x_ref"] + optimizer.scale * state["mechanic_delta"] if follows else before
            torch.testing.assert_close(parameters[0].detach(), expected, rtol=1e-14, atol=1e-14)

    def test_skips_frozen_parameters_until_they_are_trainable(self) -> None:
        parameters, loss = problem()
        parameters[0].requires_grad_(False)
        optimizer = Mechanic(adamw(parameters), s_init=1e-2, variant="optax")
        frozen = parameters[0].clone()
        train(optimizer, loss, 5)
        assert torch.equal(parameters[0], frozen)
        assert not optimizer.state.get(parameters[0])
        parameters[0].requires_grad_(True)
        train(optimizer, loss, 1, start=5)
        assert torch.equal(optimizer.state[parameters[0]]["mechanic_x_ref"], frozen)
        parameters[0].requires_grad_(False)
        parameters[0].grad = None
        again = parameters[0].detach().clone()
        loss(6).backward()
        optimizer.step()
        assert torch.equal(parameters[0], again)

    def test_an_error_in_the_base_step_rolls_back(self) -> None:
        class Fails(torch.optim.SGD):
            def step(self, closure: Any = None) -> None:
                super().step()
                raise RuntimeError("out of luck")

        for update in ("snapshot", "coupled"):
            parameters, loss = problem()
            optimizer = Mechanic(Fails(parameters, lr=1.0, weight_decay=0.1), update=update, variant="optax")
            start = tensors(parameters)
            scale = optimizer.scale
            loss(0).backward()
            with pytest.raises(RuntimeError, match="out of luck"):
                optimizer.step()
            assert_identical(tensors(parameters), start)
            assert optimizer.param_groups[0]["weight_decay"] == 0.1
            assert optimizer.scale == scale
            assert torch.is_grad_enabled()

    @pytest.mark.parametrize("nonfinite", ["raise", "ignore"])  # before the base step, and after it
    def test_an_error_in_the_tuner_restores_the_parameters(self, nonfinite: Any) -> None:
        parameters, loss = problem()
        tuner = FailingTuner(s_init=1e-2)
        optimizer = Mechanic(torch.optim.SGD(parameters, lr=1e-3), variant=tuner, nonfinite=nonfinite)
        train(optimizer, loss, 3)
        before = tensors(parameters)
        loss(3).backward()
        tuner.error = RuntimeError("connection closed by peer")
        with pytest.raises(RuntimeError, match="closed by peer"):
            optimizer.step()
        atol = 1e-15 if nonfinite == "raise" else 2e-3  # Delta has the update, at the old scale
        for p, q in zip(parameters, before):
            torch.testing.assert_close(p.detach(), q, rtol=1e-15, atol=atol)

    @pytest.mark.parametrize("options", [{}, {"update": "snapshot"}, {"store_delta": False}], ids=str)
    def test_an_interrupt_while_parameters_are_written_leaves_iterates(
        self, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(chunks, "SMALL", -1)  # no batches
        parameters, loss = problem()
        optimizer = Mechanic(adamw(parameters), s_init=1e-3, **{"variant": "optax", **options})
        train(optimizer, loss, 5)
        before = tensors(parameters)
        loss(5).backward()
        with pytest.raises(KeyboardInterrupt), FailsAt(2, KeyboardInterrupt(), "addcmul.out"):
            optimizer.step()
        for p, q in zip(parameters, before):
            torch.testing.assert_close(p.detach(), q, rtol=0.2, atol=0.2)  # a step's displacement is 0.01, an update 1
        train(optimizer, loss, 1, start=6)

    @pytest.mark.parametrize("options", [{}, {"update": "snapshot"}, {"store_delta": False}], ids=str)
    @pytest.mark.parametrize("at", [1, 2, 5])
    def test_an_interrupt_before_the_base_step_changes_nothing(
        self, options: dict[str, Any], at: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(chunks, "SMALL", -1)
        monkeypatch.setattr(chunks, "CPU_PIECE", 4)
        parameters, loss = problem()
        optimizer = Mechanic(adamw(parameters), s_init=1e-3, **{"variant": "optax", **options})
        train(optimizer, loss, 5)
        before = tensors(parameters)
        loss(5).backward()
        with pytest.raises(KeyboardInterrupt), FailsAt(at, KeyboardInterrupt(), "dot"):
            optimizer.step()
        for p, q in zip(parameters, before):
            torch.testing.assert_close(p.detach(), q, rtol=1e-15, atol=1e-15)
        train(optimizer, loss, 1, start=6)

    def test_a_snapshot_that_cannot_be_taken_changes_nothing(self) -> None:
        parameters, loss = problem()
        optimizer = Mechanic(adamw(parameters), s_init=1e-3, update="snapshot", store_delta=False, variant="optax")
        train(optimizer, loss, 5)
        before = tensors(parameters)
        loss(5).backward()
        with pytest.raises(RuntimeError, match="out of memory"), FailsAt(2, RuntimeError("out of memory"), "clone"):
            optimizer.step()
        assert_identical(tensors(parameters), before)

    def test_non_contiguous_and_zero_dimensional_parameters(self) -> None:
        results = []
        for update in ("auto", "snapshot"):
            torch.manual_seed(0)
            parameters = [torch.randn(4, 6).double().t().requires_grad_(), torch.tensor(0.5).double().requires_grad_()]
            convolution = torch.randn(2, 3, 4, 5).double().to(memory_format=torch.channels_last).requires_grad_()
            parameters.append(convolution)
            optimizer = Mechanic(adamw(parameters), s_init=1e-2, update=update, variant="optax")
            train(optimizer, lambda _: torch.stack([(p * p).sum() + p.sum() for p in parameters]).sum(), 10)  # noqa: B023
            results.append(tensors(parameters))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class TestBadInput:
    @pytest.mark.parametrize(("options", "message"), [
        ({"s_init": 0.0}, "s_init must be positive"),
        ({"s_init": -1.0}, "s_init must be positive"),
        ({"s_init": math.nan}, "s_init must be positive"),
        ({"betas": ()}, "betas must be"),
        ({"betas": (0.9, 1.0)}, "betas must be"),
        ({"betas": (0.0,)}, "betas must be"),
        ({"s_decay": -0.1}, "s_decay must be"),
        ({"eps": 0.0}, "eps must be"),
        ({"variant": "jax"}, "variant must be one of"),
        ({"plain": "parts"}, "plain must be one of"),
        ({"pipeline_stages": 0}, "pipeline_stages must be"),
        ({"update": "sideways"}, "update must be"),
    ])  # fmt: skip
    def test_option_out_of_range(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Mechanic(adamw(problem()[0]), **{"variant": "optax", **options})

    def test_nothing_to_train(self) -> None:
        parameters = [p.requires_grad_(False) for p in problem()[0]]
        with pytest.raises(ValueError, match="nothing to train"):
            Mechanic(adamw(parameters), variant="optax")
        with pytest.raises(ValueError, match="at least one optimizer"):
            Mechanic([], variant="optax")

    def test_refuses_unsupported_optimizers(self) -> None:
        parameters, _ = problem()
        with pytest.raises(TypeError, match="LBFGS"):
            Mechanic(torch.optim.LBFGS(parameters), variant="optax")
        with pytest.raises(TypeError, match="SparseAdam"):
            Mechanic(torch.optim.SparseAdam(parameters), variant="optax")
        with pytest.raises(TypeError, match="already"):
            Mechanic(Mechanic(adamw(parameters), variant="optax"), variant="optax")
        with pytest.raises(TypeError, match="already"):
            mechanize(mechanize(torch.optim.SGD, variant="optax"), variant="optax")
        with pytest.raises(TypeError, match="Optimizer objects, got list"):
            Mechanic([parameters], variant="optax")  # type: ignore[list-item]
        with pytest.raises(ValueError, match="differentiable"):
            Mechanic(torch.optim.SGD(parameters, lr=1.0, differentiable=True), variant="optax")
        with pytest.raises(ValueError, match="more than one group"):
            Mechanic([torch.optim.SGD(parameters, lr=1.0), adamw(parameters)], variant="optax")

    def test_sparse_and_complex(self) -> None:
        embedding = nn.Embedding(5, 3, sparse=True)
        optimizer = Mechanic(torch.optim.SGD(embedding.parameters(), lr=1.0), variant="optax")
        before = embedding.weight.detach().clone()
        embedding(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(TypeError, match="sparse gradient"):
            optimizer.step()
        assert torch.equal(embedding.weight.detach(), before)
        with pytest.raises(TypeError, match="complex"):
            Mechanic(
                torch.optim.SGD([torch.ones(2, dtype=torch.complex64, requires_grad=True)], lr=1.0), variant="optax"
            )
