"""State dicts, and torch's checkpointing of a new optimizer."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state_dict
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from manic import Mechanic
from support.problems import problem
from support.training import adamw, assert_identical, tensors, train
from support.tuners import rows_of, state_of

BASES: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda ps: adamw(ps),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1.0),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1.0),  # has state before its first step
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=1.0),  # its step changes more than a counter
    "asgd": lambda ps: torch.optim.ASGD(ps, lr=1.0),  # stores its initial learning rate
    "list": lambda ps: [torch.optim.SGD(ps[:1], lr=1.0, momentum=0.9), adamw(ps[1:])],
}


class Model(nn.Module):
    """The two matrices of ``problem`` as a module with parameter names."""

    def __init__(self) -> None:
        super().__init__()
        parameters, self.loss = problem(torch.float32)  # in float64, torch loads NAdam's float32 mu_product as float64
        self.a, self.b = (nn.Parameter(p.detach()) for p in parameters)
        parameters[:] = [self.a, self.b]


def make(base: str, **options: Any) -> tuple[Model, Mechanic]:
    model = Model()
    return model, Mechanic(BASES[base]([model.a, model.b]), s_init=1e-3, **{"variant": "optax", **options})


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "options", [{}, {"store_delta": False}, {"variant": "pytorch"}, {"variant": "multiplicative"}], ids=str
)
@pytest.mark.parametrize("base", BASES)
def test_resumes_bit_for_bit(base: str, options: dict[str, Any]) -> None:
    model, optimizer = make(base, **options)
    train(optimizer, model.loss, 7)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(optimizer, model.loss, 7, start=7)

    other, resumed = make(base, **options)
    for _ in range(2):  # loading twice, or after own steps, gives the same run
        train(resumed, other.loss, 2)
        other.load_state_dict(saved["model"])
        resumed.load_state_dict(state_dict=copy.deepcopy(saved["optimizer"]))
    train(resumed, other.loss, 7, start=7)
    assert resumed.scale == optimizer.scale
    assert_identical(tensors([other.a, other.b]), tensors([model.a, model.b]))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_reading_the_state_of_a_new_optimizer_changes_nothing(base: str, flat: bool) -> None:
    options = dcp_state_dict.StateDictOptions(flatten_optimizer_state_dict=flat)
    undisturbed, expected = make(base)
    train(expected, undisturbed.loss, 8)

    model, optimizer = make(base)
    start = tensors([model.a, model.b])
    saved: Any = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    assert_identical(tensors([model.a, model.b]), start)
    assert any("mechanic_x_ref" in str(key) for key in (saved if flat else saved["state"]["a"]))
    train(optimizer, model.loss, 8)
    assert optimizer.scale == expected.scale
    assert_identical(tensors([model.a, model.b]), tensors([undisturbed.a, undisturbed.b]))

    # A run resumed from that state equals it too.
    other, resumed = make(base)
    set_optimizer_state_dict(other, resumed, saved, options=options)
    train(resumed, other.loss, 8)
    assert resumed.scale == expected.scale
    assert_identical(tensors([other.a, other.b]), tensors([undisturbed.a, undisturbed.b]))


def test_takes_steps_at_the_zero_rate_of_a_warm_up() -> None:
    model, optimizer = make("adamw")
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, model.loss, 1)
    assert optimizer.state[model.a]["step"] == 1
    assert rows_of(state_of(optimizer))["updates"][0] == 1


def test_a_plain_adamw_checkpoint_keeps_its_moments_and_resets_the_tuner() -> None:
    model = Model()
    plain = adamw([model.a, model.b], lr=1e-3)
    train(plain, model.loss, 5)
    saved = plain.state_dict()
    other, optimizer = make("adamw")
    train(optimizer, other.loss, 3)
    other.load_state_dict(model.state_dict())
    optimizer.load_state_dict(saved)
    assert optimizer.scale.item() == pytest.approx(6e-3)
    assert optimizer.state[other.a]["step"] == 5
    assert torch.equal(optimizer.state[other.a]["exp_avg"], plain.state[model.a]["exp_avg"])
    before = other.a.detach().clone()
    get_optimizer_state_dict(other, optimizer)  # must not lose the moments before the first step
    train(optimizer, other.loss, 1, start=5)
    assert optimizer.state[other.a]["step"] == 6
    assert torch.equal(optimizer.state[other.a]["mechanic_x_ref"], before)


def test_a_plain_state_dict_loaded_into_the_base_resets_the_tuner() -> None:
    model = Model()
    plain = adamw([model.a, model.b], lr=1e-3)
    train(plain, model.loss, 5)
    other, optimizer = make("adamw")
    train(optimizer, other.loss, 3)
    other.load_state_dict(model.state_dict())
    optimizer.optimizers[0].load_state_dict(plain.state_dict())
    assert optimizer.scale.item() == pytest.approx(6e-3)
    train(optimizer, other.loss, 1, start=5)
    assert torch.equal(optimizer.state[other.a]["mechanic_x_ref"], model.a)


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("store_delta", [True, False])
def test_accepts_parameters_that_start_at_zero(store_delta: bool, dtype: torch.dtype, steps: int) -> None:
    """x equals its displacement, with the rounding of small numbers or of a recomputed Delta."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(50, dtype=dtype, requires_grad=True)
    optimizer = Mechanic(torch.optim.SGD([x], lr=1e-3), store_delta=store_delta, variant="optax")
    gradients = [torch.randn(50, generator=generator).to(dtype) for _ in range(steps)]
    for gradient in gradients:
        x.grad = gradient
        optimizer.step()
        optimizer.check_consistency()
    y = x.detach().clone().requires_grad_()
    resumed = Mechanic(torch.optim.SGD([y], lr=1e-3), variant="optax")
    resumed.load_state_dict(optimizer.state_dict())
    y.grad = gradients[0]
    resumed.step()


@pytest.mark.parametrize("rows", [7, 8])
def test_refuses_a_tuner_of_an_older_schema(rows: int) -> None:
    """Its rows were r, m, v, s, the number of updates, the betas, the variant and, later, the skipped steps."""
    model, optimizer = make("adamw")
    train(optimizer, model.loss, 5)
    saved, before = copy.deepcopy(optimizer.state_dict()), state_of(optimizer).clone()
    for group in saved["param_groups"]:
        group["mechanic"] = torch.rand(rows, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"does not have schema 1: another version of manic saved it. Load it with"):
        optimizer.load_state_dict(saved)
    assert torch.equal(state_of(optimizer), before)


@pytest.mark.parametrize(("change", "variant"), [
    ("trained without Mechanic", "optax"), ("no model loaded", "optax"), ("edited", "optax"),
    ("trained without Mechanic", "pytorch"), ("edited", "pytorch"),
])  # fmt: skip
def test_refuses_parameters_that_do_not_match_the_state_until_rebase(change: str, variant: str) -> None:
    model, optimizer = make("adamw", variant=variant)
    train(optimizer, model.loss, 5)
    saved = optimizer.state_dict()
    other, resumed = make("adamw", variant=variant)
    if change == "trained without Mechanic":
        other.load_state_dict(model.state_dict())
        plain = adamw([other.a, other.b])
        plain.load_state_dict(saved)
        train(plain, other.loss, 2)
        saved = plain.state_dict()
    elif change == "edited":
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            other.a.mul_(0.99)
    resumed.load_state_dict(through_a_file(saved))
    before = tensors([other.a, other.b])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"not where the loaded optimizer state says.*rebase\(\)"):
            train(resumed, other.loss, 1, start=7)
        assert_identical(tensors([other.a, other.b]), before)
    resumed.rebase()
    assert torch.equal(resumed.scale, optimizer.scale)
    assert_identical([resumed.state[p]["mechanic_x_ref"] for p in (other.a, other.b)], before)
    train(resumed, other.loss, 1, start=7)


def test_accepts_a_parameter_at_an_earlier_scale() -> None:
    """variant="pytorch" does not change parameters without a gradient, while S changes."""
    model, optimizer = make("adamw", variant="pytorch")
    train(optimizer, model.loss, 3)
    for _ in range(3):
        optimizer.zero_grad()
        model.a.square().sum().backward()
        optimizer.step()
    other, resumed = make("adamw", variant="pytorch")
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    train(resumed, other.loss, 2, start=3)
    train(optimizer, model.loss, 2, start=3)
    assert_identical(tensors([other.a, other.b]), tensors([model.a, model.b]))


def test_loads_a_mechanic_checkpoint_into_plain_adamw() -> None:
    model, optimizer = make("adamw")
    train(optimizer, model.loss, 5)
    other = Model()
    plain = adamw([other.a, other.b])
    plain.load_state_dict(optimizer.state_dict())
    train(plain, other.loss, 1)
    assert plain.state[other.a]["step"] == 6


def test_keeps_a_float32_delta_of_bfloat16_parameters() -> None:
    parameter = torch.randn(8, 8).bfloat16().requires_grad_()
    optimizer = Mechanic(torch.optim.SGD([parameter], lr=1.0), variant="optax")
    for _ in range(3):
        parameter.grad = torch.randn(8, 8).bfloat16()
        optimizer.step()
    delta = optimizer.state[parameter]["mechanic_delta"].clone()
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    loaded = optimizer.state[parameter]["mechanic_delta"]
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, delta)


def test_refuses_a_mismatched_state_dict_without_changes() -> None:
    model, optimizer = make("adamw")
    train(optimizer, model.loss, 3)
    small = torch.ones(2, requires_grad=True)
    for parameters, message in (([small], "parameters"), ([small, small.detach().requires_grad_()], "has shape")):
        other = Mechanic(adamw(parameters), variant="optax")
        scale = other.scale
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(optimizer.state_dict())
        assert other.scale == scale
    with pytest.raises(ValueError, match="parameter groups"):
        Mechanic(
            adamw([{"params": [small]}, {"params": [small.clone().detach().requires_grad_()]}]), variant="optax"
        ).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("saved_with", [True, False])
def test_store_delta_may_change_when_loading(saved_with: bool) -> None:
    model, optimizer = make("sgd", store_delta=saved_with)
    train(optimizer, model.loss, 8)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(optimizer, model.loss, 4, start=8)
    other, resumed = make("sgd", store_delta=not saved_with)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(resumed, other.loss, 4, start=8)
    assert resumed.scale.item() == pytest.approx(optimizer.scale.item(), rel=1e-2)
    torch.testing.assert_close(other.a, model.a, rtol=1e-3, atol=1e-3)
    assert ("mechanic_delta" in resumed.state[other.a]) is not saved_with


@pytest.mark.parametrize("base", BASES)
def test_keeps_weights_loaded_after_reading_the_state(base: str) -> None:
    model, optimizer = make(base)
    get_optimizer_state_dict(model, optimizer)
    with torch.no_grad():
        model.a.fill_(100.0)
    train(optimizer, model.loss, 1)
    assert (model.a - 100.0).abs().max() < 1.0


def test_wrapping_keeps_the_moments_of_a_trained_base() -> None:
    model = Model()
    base = adamw([model.a, model.b], lr=1e-3)
    train(base, model.loss, 3)
    optimizer = Mechanic(base, variant="optax")
    get_optimizer_state_dict(model, optimizer)
    train(optimizer, model.loss, 1, start=3)
    assert optimizer.state[model.a]["step"] == 4


@pytest.mark.parametrize(("options", "words"), [
    ({"betas": (0.9, 0.99)}, "other betas"), ({"betas": (0.8, 0.99, 0.999, 0.9999, 0.99999, 0.999999)}, "other betas"),
    ({"variant": "pytorch"}, "of variant optax, this one pytorch"),
], ids=str)  # fmt: skip
def test_refuses_a_tuner_with_other_settings_without_changes(options: dict[str, Any], words: str) -> None:
    model, optimizer = make("adamw")
    train(optimizer, model.loss, 3)
    other, resumed = make("adamw", **options)
    train(resumed, other.loss, 1)
    before = copy.deepcopy(resumed.state_dict())
    with pytest.raises(ValueError, match=words):
        resumed.load_state_dict(optimizer.state_dict())
    after = resumed.state_dict()
    assert torch.equal(after["state"][0]["exp_avg"], before["state"][0]["exp_avg"])
    assert torch.equal(after["param_groups"][0]["mechanic"], before["param_groups"][0]["mechanic"])


def test_loads_a_checkpoint_of_another_precision() -> None:
    model, optimizer = make("sgd")
    train(optimizer, model.loss, 3)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        other = Model().to(dtype)
        resumed = Mechanic(BASES["sgd"]([other.a, other.b]), s_init=1e-3, variant="optax")
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for p in (other.a, other.b):
            p.grad = torch.ones_like(p)
        resumed.step()
        assert resumed.state[other.a]["mechanic_x_ref"].dtype == dtype
        model, optimizer = other, resumed  # load from this precision next


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "plain", "mechanic"])
def test_loads_a_checkpoint_with_a_parameter_without_gradients(how: str) -> None:
    model, optimizer = make("adamw")
    model.b.requires_grad_(True)
    (model.a.square().sum()).backward()
    optimizer.step()
    assert model.b not in optimizer.state
    if how == "deepcopy":
        copy.deepcopy(optimizer)
    elif how == "pickle":
        pickle.loads(pickle.dumps(optimizer))
    elif how == "plain":
        other = Model()
        adamw([other.a, other.b]).load_state_dict(optimizer.state_dict())
    else:
        other, resumed = make("adamw")
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(optimizer.state_dict())
        train(resumed, other.loss, 2)
        assert "mechanic_x_ref" in resumed.state[other.b]


def test_reading_the_state_keeps_loaded_moments_beside_a_stateless_base() -> None:
    def bases(model: Model) -> list[torch.optim.Optimizer]:
        return [adamw([model.a]), torch.optim.SGD([model.b], lr=1.0)]

    model = Model()
    plain = bases(model)
    for optimizer in plain:
        train(optimizer, model.loss, 3)
    states, groups = {}, []
    for index, optimizer in enumerate(plain):
        saved = optimizer.state_dict()
        states.update(dict.fromkeys([index] if saved["state"] else [], saved["state"].get(0)))
        groups.append({**saved["param_groups"][0], "params": [index]})
    other = Model()
    joint = Mechanic(bases(other), variant="optax")
    joint.load_state_dict({"state": states, "param_groups": groups})
    get_optimizer_state_dict(other, joint)
    train(joint, other.loss, 1)
    assert joint.state[other.a]["step"] == 4


def test_runs_load_hooks() -> None:
    _, optimizer = make("adamw")
    calls = []
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("after"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before", "after"]


def test_writes_to_state_reach_the_base() -> None:
    """ZeroRedundancyOptimizer assigns to state and to the dicts in it."""
    model, optimizer = make("list")
    train(optimizer, model.loss, 1)
    optimizer.state[model.b] = {"step": torch.tensor(7.0)}
    optimizer.state[model.b]["more"] = 1
    assert optimizer.optimizers[1].state[model.b] == {"step": torch.tensor(7.0), "more": 1}
    del optimizer.state[model.a]
    assert model.a not in optimizer.optimizers[0].state
    assert len(optimizer.state) == 1
    assert "step" in repr(optimizer.state)


def test_torch_has_the_function_that_creates_state() -> None:
    assert callable(dcp_state_dict._init_optim_state)
