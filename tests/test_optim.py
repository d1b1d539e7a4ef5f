"""The ready-made classes: each is Mechanic around torch's class of that name, for code that names a class."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import manic
from manic import Mechanic, mechanize
from manic.checkpoint import Checkpointer
from manic.testing import run
from support.problems import problem
from support.training import assert_identical, tensors, train

NAMES = manic.optim.__all__
OF_TORCH = [
    name for name, cls in vars(torch.optim).items() if isinstance(cls, type) and issubclass(cls, Optimizer)
    if cls is not Optimizer
]  # fmt: skip


@pytest.mark.parametrize("name", OF_TORCH)
def test_there_is_a_class_for_each_optimizer_that_mechanic_can_wrap(name: str) -> None:
    if name not in NAMES:
        with pytest.raises(TypeError, match="cannot wrap"):
            Mechanic(getattr(torch.optim, name)(problem()[0]))


@pytest.mark.parametrize("name", NAMES)
def test_is_mechanic_around_torchs_class(name: str) -> None:
    parameters, loss = problem()
    optimizer = getattr(manic, name)(parameters, variant="optax", s_init=1e-3)
    twins, twin_loss = problem()
    twin = Mechanic(getattr(torch.optim, name)(twins, lr=1.0), variant="optax", s_init=1e-3)
    assert isinstance(optimizer, Mechanic)
    assert isinstance(optimizer, Optimizer)
    train(optimizer, loss, 10)
    train(twin, twin_loss, 10)
    assert optimizer.scale == twin.scale
    assert_identical(tensors(parameters), tensors(twins))


@pytest.mark.parametrize("name", NAMES)
def test_signature_is_the_bases_and_then_mechanics(name: str) -> None:
    cls = getattr(manic, name)
    base = inspect.signature(getattr(torch.optim, name)).parameters
    own = list(inspect.signature(Mechanic).parameters)[1:]
    spelled = ["tuner_" * (each in ("betas", "eps")) + each for each in own]
    found = inspect.signature(cls).parameters
    assert list(found) == [*base, *spelled]
    assert found["lr"].default == 1.0
    assert all(found[each] == base[each] for each in base if each != "lr")
    assert all(found[each].kind is inspect.Parameter.KEYWORD_ONLY for each in spelled)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("module", ["manic", "manic.optim"])
def test_has_dotted_paths(module: str, name: str) -> None:
    cls = getattr(importlib.import_module(module), name)
    assert getattr(importlib.import_module(cls.__module__), cls.__qualname__) is cls


def test_arguments_of_base_and_tuner_are_told_apart() -> None:
    parameters, _ = problem()
    optimizer = manic.AdamW(
        parameters, 0.5, betas=(0.8, 0.9), eps=1e-6, tuner_betas=(0.9, 0.99), tuner_eps=1e-5, variant="optax"
    )
    assert optimizer.defaults["lr"] == 0.5
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["eps"] == 1e-6
    assert "betas=(0.9, 0.99)" in repr(optimizer)
    assert "eps=1e-05" in repr(optimizer)


def test_param_groups_are_the_bases() -> None:
    parameters, loss = problem()
    groups = [{"params": parameters[:1], "weight_decay": 0.0}, {"params": parameters[1:], "lr": 0.1}]
    optimizer = manic.AdamW(groups, weight_decay=0.1, scale="per group")
    train(optimizer, loss, 3)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(1.0, 0.0), (0.1, 0.1)]
    assert optimizer.scale.shape == (2,)


@pytest.mark.parametrize(("given", "message"), [
    ({"weight_decy": 0.1}, "AdamW has no option 'weight_decy'; did you mean 'weight_decay'"),
    ({"nonfinit": "skip"}, "did you mean 'nonfinite'"),
    ({"qwertz": 3}, "it has params, lr, betas"),
])  # fmt: skip
def test_an_unknown_option_is_refused_with_the_closest(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        manic.AdamW(problem()[0], **given)


@pytest.mark.parametrize("option", ["betas", "eps"])
def test_an_option_of_the_tuner_is_known_by_its_name_here(option: str) -> None:
    with pytest.raises(TypeError, match=f"SGD has no option '{option}'; did you mean 'tuner_{option}'"):
        manic.SGD(problem()[0], **{option: 0.9})


def test_parameters_are_required() -> None:
    with pytest.raises(TypeError, match="params"):
        manic.AdamW(lr=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue_like_the_original(how: str) -> None:
    parameters, loss = problem()
    optimizer = manic.AdamW(parameters, weight_decay=0.1, tuner_betas=(0.9,))
    CosineAnnealingLR(optimizer, T_max=10)  # replaces the object's step
    train(optimizer, loss, 5)
    twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert type(twin) is manic.AdamW
    assert repr(twin) == repr(optimizer)
    copies = [p for group in twin.param_groups for p in group["params"]]
    for step in range(5, 10):
        loss(step).backward()
        for p, q in zip(parameters, copies, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        twin.step()
        optimizer.zero_grad()
    assert twin.scale == optimizer.scale
    assert_identical(tensors(copies), tensors(parameters))


def test_the_class_is_pickled_by_name() -> None:
    assert pickle.loads(pickle.dumps(manic.Muon)) is manic.Muon


def test_repr_says_what_it_is() -> None:
    text = repr(manic.SGD(problem()[0], momentum=0.9, s_max=0.5))
    assert text.startswith("manic.optim.SGD(variant=multiplicative, ")
    assert "s_max=0.5" in text
    assert "momentum: 0.9" in text


def test_may_be_subclassed() -> None:
    class Mine(manic.AdamW):
        def __init__(self, params: Any) -> None:
            super().__init__(params, weight_decay=0.3)

    assert list(inspect.signature(Mine).parameters) == ["params"]
    assert Mine(problem()[0]).defaults["weight_decay"] == 0.3


def zero(ready_made: bool, seed: int) -> tuple[nn.Module, ZeroRedundancyOptimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    cls = manic.AdamW if ready_made else mechanize(torch.optim.AdamW, plain="sharded")
    options: dict[str, Any] = {"plain": "sharded"} if ready_made else {}
    return model, ZeroRedundancyOptimizer(model.parameters(), optimizer_class=cls, lr=1.0, **options)


def train_zero(model: nn.Module, optimizer: ZeroRedundancyOptimizer, steps: range) -> tuple[float, list[Tensor]]:
    for step in steps:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x[:, :2].sin()).square().mean().backward()
        optimizer.step()
    return manic.unwrap(optimizer).scale.item(), [p.detach() for p in model.parameters()]


def in_zero(ready_made: bool) -> tuple[float, list[Tensor]]:
    return train_zero(*zero(ready_made, 0), range(5))


def test_is_a_class_for_zero() -> None:
    for (scale, parameters), (expected, of_mechanize) in zip(run(in_zero, 2, True), run(in_zero, 2, False)):
        assert scale == expected
        assert_identical(parameters, of_mechanize)


def resume_zero(folder: str) -> None:
    whole = zero(True, 0)
    train_zero(*whole, range(5))
    Checkpointer(folder, *whole).save(5)
    resumed = zero(True, 1)
    Checkpointer(folder, *resumed).load()
    (scale, parameters), (expected, of_whole) = (train_zero(*each, range(5, 9)) for each in (resumed, whole))
    assert scale == expected
    assert_identical(parameters, of_whole)


def test_resumes_in_zero(tmp_path: Path) -> None:
    run(resume_zero, 2, str(tmp_path))
