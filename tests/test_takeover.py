"""Mechanic continues a run of mechanic-pytorch with equal steps."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from manic import Mechanic
from manic.takeover import from_mechanic_pytorch
from support.golden.problems import PROBLEMS, data, start
from support.golden.torch_losses import loss
from support.tuners import rows_of, state_of

peer = pytest.importorskip("mechanic_pytorch")

BASES: dict[str, tuple[type[Optimizer], dict[str, Any], list[dict[str, Any]]]] = {
    "sgd": (SGD, {"lr": 1.0}, [{}]),
    "momentum": (SGD, {"lr": 1.0, "momentum": 0.9}, [{}]),
    "adamw": (AdamW, {"lr": 1.0, "weight_decay": 0.1}, [{}]),
    "adam, two groups": (Adam, {"lr": 1.0}, [{"lr": 0.3}, {"weight_decay": 0.1, "amsgrad": True}]),
}
STEPS = 12
MORE_STEPS = 25


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    """The package stores its tuner in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def begin(problem: str) -> dict[str, Tensor]:
    return {name: torch.tensor(array, dtype=torch.get_default_dtype()) for name, array in start(problem).items()}


class Run:
    """Parameters of ``problem`` that start at ``values``, and an optimizer over them."""

    def __init__(self, problem: str, base: str, values: dict[str, Tensor], wrap: Callable[..., Any]) -> None:
        self.problem = problem
        self.parameters = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
        cls, settings, groups = BASES[base]
        tensors = list(self.parameters.values())
        split = [tensors] if len(groups) == 1 else [tensors[:1], tensors[1:]]
        self.optimizer = wrap(cls, [{**group, "params": part} for group, part in zip(groups, split)], settings)

    def step(self, leave_out: str | None = None) -> None:
        self.optimizer.zero_grad()
        x, y = (torch.tensor(array, dtype=torch.get_default_dtype()) for array in data())
        loss(self.problem, self.parameters, x, y).backward()
        if leave_out is not None:
            self.parameters[leave_out].grad = None
        self.optimizer.step()

    @property
    def scale(self) -> float:
        if isinstance(self.optimizer, Mechanic):
            return self.optimizer.scale.item()
        return self.optimizer.state["_mechanic"]["s"].sum().clamp(min=0.0).item()


def old_run(problem: str, base: str, steps: int = STEPS, leave_out: str | None = None, **options: Any) -> Run:
    run = Run(problem, base, begin(problem), lambda cls, groups, kw: peer.mechanize(cls, **options)(groups, **kw))
    for _ in range(steps):
        run.step(leave_out)
    return run


def convert_run(old: Run, base: str, state_dict: dict[str, Any], **other_options: Any) -> Run:
    loaded, options = from_mechanic_pytorch(state_dict)
    options |= other_options
    new = Run(old.problem, base, old.parameters, lambda cls, groups, kw: Mechanic(cls(groups, **kw), **options))
    new.optimizer.load_state_dict(loaded)
    return new


def saved_and_loaded(state_dict: dict[str, Any], weights_only: bool = True) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def assert_continues_equally(new: Run, old: Run, tolerance: float = 1e-10, steps: int = MORE_STEPS) -> None:
    assert new.scale == pytest.approx(old.scale, rel=tolerance, abs=0.0)
    for _ in range(steps):
        old.step()
        new.step()
        assert new.scale == pytest.approx(old.scale, rel=tolerance, abs=0.0)
        for name, expected in old.parameters.items():
            torch.testing.assert_close(new.parameters[name], expected, rtol=tolerance, atol=tolerance)
    assert rows_of(state_of(new.optimizer), "pytorch")["updates"][0] == old.optimizer.state["_mechanic"]["iter_count"]


@pytest.mark.parametrize("store_delta", [False, True])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_converts_a_live_optimizer_to_1e_10(problem: str, base: str, store_delta: bool) -> None:
    old = old_run(problem, base, store_delta=store_delta)
    assert_continues_equally(convert_run(old, base, copy.deepcopy(old.optimizer.state_dict())), old)


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("base", BASES)
def test_converts_a_saved_state_dict_to_1e_10(base: str, weights_only: bool) -> None:
    old = old_run("network", base)
    assert_continues_equally(convert_run(old, base, saved_and_loaded(old.optimizer.state_dict(), weights_only)), old)


def test_converts_a_state_that_the_package_cannot_step() -> None:
    old = old_run("network", "momentum")
    stuck = Run("network", "momentum", old.parameters, lambda cls, groups, kw: peer.mechanize(cls)(groups, **kw))
    stuck.optimizer.load_state_dict(saved_and_loaded(old.optimizer.state_dict()))
    assert_continues_equally(convert_run(old, "momentum", stuck.optimizer.state_dict()), old)


@pytest.mark.parametrize("steps", [1, 2, 25])
def test_converts_after_any_number_of_steps(steps: int) -> None:
    old = old_run("network", "momentum", steps)
    assert_continues_equally(convert_run(old, "momentum", saved_and_loaded(old.optimizer.state_dict())), old)


@pytest.mark.parametrize("store_delta", [False, True])
def test_converts_nondefault_settings(store_delta: bool) -> None:
    settings: dict[str, Any] = {
        "betas": (0.8, 0.95, 0.999),
        "s_init": 1e-4,
        "s_decay": 0.3,
        "eps": 1e-6,
        "store_delta": store_delta,
    }
    old = old_run("network", "adamw", **settings)
    _, options = from_mechanic_pytorch(old.optimizer.state_dict())
    assert options == {**settings, "variant": "pytorch"}
    assert_continues_equally(convert_run(old, "adamw", saved_and_loaded(old.optimizer.state_dict())), old)


def test_store_delta_starts_from_the_recomputed_delta() -> None:
    old = old_run("network", "momentum")
    new = convert_run(old, "momentum", saved_and_loaded(old.optimizer.state_dict()), store_delta=True)
    assert_continues_equally(new, old, steps=1)  # later steps differ: the package divides by S + eps in each
    assert all("mechanic_delta" in new.optimizer.state[p] for p in new.parameters.values())


@pytest.mark.parametrize("base", ["sgd", "adamw", "adam, two groups"])
def test_a_parameter_without_a_gradient_is_trained_later(base: str) -> None:
    old = old_run("network", base, leave_out="w1")
    new = convert_run(old, base, saved_and_loaded(old.optimizer.state_dict()))
    assert new.parameters["w1"] not in new.optimizer.state
    copy.deepcopy(new.optimizer)  # base optimizers expect their keys in any state
    assert_continues_equally(new, old)


def test_a_converted_run_can_be_saved_and_loaded() -> None:
    old = old_run("network", "adamw")
    first = convert_run(old, "adamw", saved_and_loaded(old.optimizer.state_dict()))
    again = Run(
        "network", "adamw", first.parameters,
        lambda cls, groups, kw: Mechanic(cls(groups, **kw), variant="pytorch", store_delta=False),
    )  # fmt: skip
    again.optimizer.load_state_dict(saved_and_loaded(first.optimizer.state_dict()))
    assert_continues_equally(again, old)


def test_does_not_change_the_state_dict() -> None:
    state_dict = old_run("network", "adamw").optimizer.state_dict()
    keys = copy.deepcopy([list(state_dict["state"][0]), list(state_dict["state"]), list(state_dict["param_groups"][0])])
    from_mechanic_pytorch(state_dict)
    assert [list(state_dict["state"][0]), list(state_dict["state"]), list(state_dict["param_groups"][0])] == keys


def test_a_float32_run_continues_from_its_rounded_settings() -> None:
    torch.set_default_dtype(torch.float32)
    old = old_run("network", "adamw", store_delta=True)
    new = convert_run(old, "adamw", saved_and_loaded(old.optimizer.state_dict()))
    assert new.scale == pytest.approx(old.scale, rel=1e-6)
    mechanic = old.optimizer.state["_mechanic"]
    for name, parameter in old.parameters.items():
        mine = new.optimizer.state[new.parameters[name]]
        assert torch.equal(mine["mechanic_x_ref"], mechanic[parameter]["ref"])
        assert torch.equal(mine["mechanic_delta"], mechanic[parameter]["delta"])
    assert_continues_equally(new, old, tolerance=1e-5)
    # Betas rounded to float32 match the default.
    loaded, _ = from_mechanic_pytorch(old.optimizer.state_dict())
    Mechanic(AdamW(old.parameters.values()), variant="pytorch").load_state_dict(loaded)


def test_keeps_a_delta_below_the_rounding_of_x() -> None:
    parameter = torch.full((3,), 1e12, requires_grad=True)
    optimizer = peer.mechanize(SGD, store_delta=True)([parameter], lr=1.0)
    parameter.grad = torch.full((3,), 2.0)
    optimizer.step()
    assert torch.equal(parameter, torch.full((3,), 1e12))
    loaded, _ = from_mechanic_pytorch(optimizer.state_dict())
    assert torch.equal(loaded["state"][0]["mechanic_delta"], torch.full((3,), -2.0))


def broken(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    state_dict = copy.deepcopy(old_run("network", "adamw", 2).optimizer.state_dict())
    change(state_dict)
    return state_dict


def lose_a_parameter(state_dict: dict[str, Any]) -> None:
    mechanic = state_dict["state"]["_mechanic"]
    del mechanic[next(key for key in mechanic if isinstance(key, Tensor))]


@pytest.mark.parametrize(("make", "words"), [
    (lambda: {"model": {}, "optimizer": {}}, r"not an optimizer's state dict.*expected.*got \['model', 'optimizer'\]"),
    (lambda: AdamW([torch.ones(1)]), "not an optimizer's state dict.*expected.*got AdamW.*pass"),
    (lambda: AdamW([torch.ones(1)]).state_dict(), "not a state dict of mechanic-pytorch.*expected '_mechanic'.*Load"),
    (lambda: old_run("network", "adamw", 0).optimizer.state_dict(), "expected '_mechanic'.*in the first step"),
    (lambda: broken(lambda state: state["state"]["_mechanic"].pop("reward")), r"lacks \['reward'\].*expected.*pass"),
    (lambda: broken(lose_a_parameter), "reference points of 2 parameters.*have 3.*Expected.*pass"),
], ids=["checkpoint", "optimizer", "plain", "no step yet", "incomplete", "a parameter less"])  # fmt: skip
def test_refuses_other_states(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_mechanic_pytorch(make())
