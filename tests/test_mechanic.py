"""Mechanic as a torch.optim.Optimizer: steps, hooks, schedulers, copies, and errors."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

from manic import Mechanic, is_mechanized, mechanize
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


class TestOptimizerInterface:
    @pytest.mark.parametrize("held", ["wrapper", "base"])
    def test_schedulers_drive_it_before_and_after_a_load(self, held: str) -> None:
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

    def test_other_schedulers(self) -> None:
        parameters, _ = problem()
        LambdaLR(Mechanic(adamw(parameters), variant="optax"), lambda step: 1.0)
        OneCycleLR(Mechanic(adamw(parameters), variant="optax"), max_lr=1.0, total_steps=10)
        ReduceLROnPlateau(Mechanic(adamw(parameters), variant="optax")).step(1.0)

    def test_step_hooks_run_once(self) -> None:
        parameters, loss = problem()
        optimizer = mechanize(torch.optim.SGD, variant="optax")(parameters, lr=1.0)
        calls: list[str] = []
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        loss(0).backward()
        optimizer.step()
        assert calls == ["before", "after"]

    def test_zero_grad(self) -> None:
        parameters, loss = problem()
        optimizer = Mechanic(adamw(parameters), variant="optax")
        loss(0).backward()
        optimizer.zero_grad(set_to_none=False)
        assert all(not p.grad.any() for p in parameters if p.grad is not None)
        optimizer.zero_grad()
        assert all(p.grad is None for p in parameters)

    def test_add_param_group(self) -> None:
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

    def test_add_param_group_with_several_bases_is_refused(self) -> None:
        parameters, loss = problem()
        extra = torch.ones(3, dtype=torch.float64, requires_grad=True)
        bases = [torch.optim.SGD(parameters[:1], lr=1.0), adamw(parameters[1:])]
        optimizer = Mechanic(bases, variant="optax")
        with pytest.raises(ValueError, match="SGD, AdamW"):
            optimizer.add_param_group({"params": [extra]})
        bases[0].add_param_group({"params": [extra]})
        train(optimizer, lambda step: loss(step) + extra.sum(), 3)
        assert "mechanic_x_ref" in optimizer.state[extra]

    def test_refuses_a_parameter_added_twice(self) -> None:
        parameters, loss = problem()
        bases = [torch.optim.SGD(parameters[:1], lr=1.0), adamw(parameters[1:])]
        optimizer = Mechanic(bases, variant="optax")
        bases[0].add_param_group({"params": parameters[1:]})
        loss(0).backward()
        with pytest.raises(ValueError, match="more than one group"):
            optimizer.step()

    def test_repr_names_bases_and_settings_but_not_tensors(self) -> None:
        parameters, _ = problem()
        text = repr(
            Mechanic([torch.optim.SGD(parameters[:1], lr=1.0), adamw(parameters[1:])], s_init=0.5, variant="optax")
        )
        assert "Mechanic(SGD, AdamW" in text
        assert "s_init=0.5" in text
        assert "weight_decay: 0.1" in text
        assert "tensor" not in text

    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    @pytest.mark.parametrize("bases", ["one", "two", "mechanized"])
    def test_copies_continue_like_the_original(self, how: str, bases: str) -> None:
        parameters, loss = problem()
        if bases == "one":
            optimizer = Mechanic(adamw(parameters), variant="optax")
        elif bases == "two":
            optimizer = Mechanic(
                [torch.optim.SGD(parameters[:1], lr=1.0, momentum=0.9), adamw(parameters[1:])], variant="optax"
            )
        else:
            optimizer = mechanize(torch.optim.AdamW, s_init=1e-3, variant="optax")(parameters, lr=1.0)
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

    def test_grad_scaler_unscales_first_and_skips_overflow(self) -> None:
        assert not getattr(
            Mechanic(adamw(problem()[0], fused=True), variant="optax"), "_step_supports_amp_scaling", False
        )
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

    def test_metrics_are_scalars_of_the_whole_model(self) -> None:
        parameters, loss = problem()
        optimizer = Mechanic(adamw(parameters), s_init=1e-3, variant="optax")
        assert optimizer.metrics()["h"].isnan()
        train(optimizer, loss, 3)
        norm = torch.cat([p.detach().ravel() for p in parameters]).norm()
        loss(3).backward()
        gradient = torch.cat([p.grad.ravel() for p in parameters if p.grad is not None]).norm()
        optimizer.step()
        metrics = optimizer.metrics()
        assert all(isinstance(v, Tensor) and v.ndim == 0 for v in metrics.values())
        assert metrics["param_norm"].item() == pytest.approx(norm.item(), rel=1e-12)
        assert metrics["scale"] == optimizer.scale
        assert metrics["effective_lr/0"] == optimizer.scale
        assert metrics["grad_norm"].item() > 0
        assert gradient > 0


class TestMechanize:
    def test_is_the_wrapper_as_a_class(self) -> None:
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

    def test_is_mechanized(self) -> None:
        parameters, _ = problem()
        assert is_mechanized(mechanize(torch.optim.SGD, variant="optax")(parameters, lr=1.0))
        assert is_mechanized(Mechanic(adamw(parameters), variant="optax"))
        assert not is_mechanized(adamw(parameters))

    def test_logs_every_n_steps(self) -> None:
        parameters, loss = problem()
        seen: list[dict[str, Any]] = []
        optimizer = mechanize(torch.optim.SGD, log_func=seen.append, log_every=3, variant="optax")(parameters, lr=1.0)
        train(optimizer, loss, 7)
        assert [record["iter_count"] for record in seen] == [3, 6]
        optimizer.load_state_dict(optimizer.state_dict())
        train(optimizer, loss, 2, start=7)
        assert seen[-1]["iter_count"] == 9
        assert all(isinstance(record["s"], float) for record in seen)


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
