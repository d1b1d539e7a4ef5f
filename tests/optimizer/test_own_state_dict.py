"""A base optimizer with a state dict of its own is saved and loaded by it, or refused."""

from __future__ import annotations

import copy
import io
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import AdamW, Optimizer

from manic import Mechanic
from manic.checkpoint import Checkpointer
from manic.testing import run


class Overriding(AdamW):
    """Keeps a class in its groups, which it leaves out of its state dict, and a number beside its state."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, **options)
        self.seen: Any = 0
        for group in self.param_groups:
            group["__class__"] = type(self)

    def step(self, closure: Any = None) -> None:
        super().step()
        self.seen += 1

    def state_dict(self) -> dict[str, Any]:
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            del group["__class__"]
        return {**state_dict, "extra": {"seen": self.seen}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["__class__"] = type(self)
        self.seen = state_dict.get("extra", {}).get("seen")


class Hooked(AdamW):
    """Adds its entry by a hook."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, **options)
        self.seen: Any = 0
        self.register_step_post_hook(lambda *_: setattr(self, "seen", self.seen + 1))
        self.register_state_dict_post_hook(lambda _, saved: saved.update(extra={"seen": self.seen}))
        self.register_load_state_dict_pre_hook(lambda _, saved: setattr(self, "seen", saved["extra"]["seen"]))


class Outer(Optimizer):
    """Saves the state of an optimizer inside of it, as Lookahead does."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        self.inner = Overriding(parameters, **options)
        super().__init__(self.inner.param_groups, {})
        self.param_groups = self.inner.param_groups
        self.state = defaultdict(dict)

    @property
    def seen(self) -> Any:
        return self.inner.seen

    def step(self, closure: Any = None) -> None:
        self.inner.step()

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        self.param_groups = self.inner.param_groups


def make(base: type[Any], variant: str | None, seed: int) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(seed)
    model = nn.Linear(4, 3, dtype=torch.bfloat16)
    optimizer = base(model.parameters(), lr=0.01 if variant is None else 1.0)
    return model, optimizer, optimizer if variant is None else Mechanic(optimizer, variant=variant, s_init=1e-3)


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).bfloat16()
        optimizer.zero_grad()
        (model(x) - x[:, :3].sin()).square().mean().backward()
        optimizer.step()


def assert_equal(one: nn.Module, two: nn.Module) -> None:
    for p, q in zip(one.parameters(), two.parameters()):
        assert torch.equal(p, q)


VARIANTS = [None, "multiplicative", "optax"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", [Overriding, Hooked, Outer])
def test_a_saved_state_dict_resumes_the_run(base: type[Any], variant: str | None) -> None:
    model, _, optimizer = make(base, variant, 0)
    train(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved["extra"] == {"seen": 4}
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(4, 8))

    other, inner, resumed = make(base, variant, 1)
    train(other, resumed, range(2))
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    assert inner.seen == 4
    if variant is not None:
        state = resumed.state[other.weight]
        kinds = {name: value.dtype for name, value in state.items() if name.startswith("mechanic")}
        reference = torch.float32 if variant == "multiplicative" else torch.bfloat16  # those that follow x are wide
        assert kinds == {name: torch.float32 if name == "mechanic_delta" else reference for name in kinds}
        assert kinds.keys() >= {"mechanic_x_ref", "mechanic_delta"}
        assert torch.equal(resumed.param_groups[0]["mechanic"], saved["param_groups"][0]["mechanic"])
    train(other, resumed, range(4, 8))
    assert_equal(model, other)


@pytest.mark.parametrize("base", [Overriding, Hooked])
def test_hooks_of_mechanic_see_the_whole_state_dict(base: type[Any]) -> None:
    model, _, optimizer = make(base, "multiplicative", 0)
    train(model, optimizer, range(2))
    calls: list[Any] = []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("before"))
    optimizer.register_state_dict_post_hook(lambda _, saved: calls.append(sorted(saved)))
    optimizer.state_dict()
    assert calls == ["before", ["extra", "param_groups", "state"]]


@pytest.mark.parametrize("base", [Overriding, Hooked])
def test_a_state_dict_of_the_base_alone_resets_the_tuner(base: type[Any]) -> None:
    model, inner, _ = make(base, None, 0)
    train(model, inner, range(3))
    other, inner_of_other, mechanic = make(base, "optax", 1)
    train(other, mechanic, range(2))
    mechanic.load_state_dict(inner.state_dict())
    assert inner_of_other.seen == 3
    assert not any(key.startswith("mechanic") for state in mechanic.state.values() for key in state)
    assert mechanic.scale.item() == pytest.approx(6e-3)


def resume_by_checkpointer(base: type[Any], variant: str | None, folder: str) -> None:
    model, _, optimizer = make(base, variant, 0)
    train(model, optimizer, range(4))
    Checkpointer(folder, model, optimizer).save(4)
    train(model, optimizer, range(4, 8))
    other, inner, resumed = make(base, variant, 1)
    Checkpointer(folder, other, resumed).load()
    assert inner.seen == 4
    train(other, resumed, range(4, 8))
    assert_equal(model, other)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", [Overriding, Hooked])
def test_checkpointer_saves_further_entries(base: type[Any], variant: str | None, tmp_path: Path) -> None:
    resume_by_checkpointer(base, variant, str(tmp_path))


def test_checkpointer_saves_further_entries_on_two_ranks(tmp_path: Path) -> None:
    run(resume_by_checkpointer, 2, Overriding, "multiplicative", str(tmp_path))


def save_differing(folder: str) -> None:
    model, inner, optimizer = make(Overriding, "multiplicative", 0)
    train(model, optimizer, range(2))
    inner.seen = torch.distributed.get_rank()
    with pytest.raises(ValueError, match=r"not saved: .* entries besides its state and param groups, .* differ"):
        Checkpointer(folder, model, optimizer).save(2)


def test_checkpointer_refuses_further_entries_that_differ_between_ranks(tmp_path: Path) -> None:
    run(save_differing, 2, str(tmp_path))


def test_checkpointer_refuses_entries_that_the_optimizer_does_not_have(tmp_path: Path) -> None:
    model, _, optimizer = make(Overriding, None, 0)
    train(model, optimizer, range(2))
    Checkpointer(tmp_path, model, optimizer).save(2)
    other, _, plain = make(AdamW, None, 1)
    with pytest.raises(ValueError, match=r"another optimizer: state_dict\(\) of optimizer 0 had 'extra' there"):
        Checkpointer(tmp_path, other, plain).load()


class WithoutGroups(AdamW):
    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [super().state_dict()]}


def test_refuses_a_state_dict_that_cannot_hold_mechanics_state() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"WithoutGroups\.state_dict\(\) has no 'state' and 'param_groups'"):
        Mechanic(WithoutGroups(model.parameters()))
    for base in (Overriding, Hooked):
        with pytest.raises(TypeError, match=f"{base.__name__} has a state_dict.* of its own, .* cannot be joined"):
            Mechanic([base([model.weight]), AdamW([model.bias])])
    patched = AdamW([model.weight])
    patched.state_dict = dict  # type: ignore[method-assign]
    with pytest.raises(TypeError, match=r"AdamW has a state_dict\(\) of its own"):
        Mechanic([patched, AdamW([model.bias])])


class Structured(torch.optim.SGD):
    """Keeps numbers as keys, a list of tensors and a set under each parameter."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    kept = self.state[parameter].setdefault(0, {"all": [torch.zeros(2), torch.zeros(3)], "is": set()})
                    kept["all"][1] += parameter.grad.float().norm()
                    kept["is"].add(int(kept["all"][1].any()))
        super().step()


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointer_keeps_the_structure_of_a_state(variant: str | None, tmp_path: Path) -> None:
    model, _, optimizer = make(Structured, variant, 0)
    train(model, optimizer, range(3))
    Checkpointer(tmp_path, model, optimizer).save(3)
    other, _, resumed = make(Structured, variant, 1)
    Checkpointer(tmp_path, other, resumed).load()
    for p, q in zip(model.parameters(), other.parameters()):
        saved, found = optimizer.state[p][0], resumed.state[q][0]
        assert found["is"] == saved["is"]
        assert type(found["all"]) is list
        for one, two in zip(saved["all"], found["all"], strict=True):
            assert torch.equal(one.to(two.dtype), two)


def test_torchs_functions_find_state_and_groups() -> None:
    model, _, optimizer = make(Overriding, "optax", 0)
    train(model, optimizer, range(2))
    found: Any = get_optimizer_state_dict(model, optimizer)
    assert found["state"]["weight"]["mechanic_x_ref"] is optimizer.state[model.weight]["mechanic_x_ref"]
