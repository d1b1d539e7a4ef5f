"""Names of a run's state in a checkpoint, for every wrapper of the model, and the state of further objects."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

from manic import Mechanic, NonfiniteError
from manic.checkpoint import Checkpointer
from manic.checkpoint.flat_state import parameter_names
from manic.inspect import inspect
from manic.testing import ranks


def net() -> nn.ModuleDict:
    return nn.ModuleDict({"module": nn.Linear(2, 2), "_orig": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))})


@ranks(1)
def test_parameter_names_have_no_wrapper_prefixes() -> None:
    """Also fails if torch renames _get_fqns or changes its meaning."""
    expected = [name for name, _ in net().named_parameters()]
    wrapped = net()
    wrapped["_orig"] = checkpoint_wrapper(wrapped["_orig"])
    compiled: Any = torch.compile(DistributedDataParallel(net()))
    for model in (net(), wrapped, DistributedDataParallel(wrapped), compiled):
        names = parameter_names(model)
        assert [names[id(p)] for p in model.parameters()] == expected


class Box:
    """An object with any state."""

    def __init__(self, state: Any = None) -> None:
        self.state = {} if state is None else state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def checkpointer(directory: Path, **objects: Any) -> Checkpointer:
    model = nn.Linear(2, 2)
    return Checkpointer(directory, model, torch.optim.SGD(model.parameters(), lr=1.0), objects=objects)


@pytest.mark.parametrize("state", [
    {"seen": {3: "a", 4: ["b", {}]}, "empty": {}, "pair": (1, None)}, {}, {"epoch": 7}, "text", [1, 2, {"x": 3}],
], ids=str)  # fmt: skip
def test_restores_an_objects_state_over_any_other(state: Any, tmp_path: Path) -> None:
    checkpointer(tmp_path, box=Box(state)).save(1)
    fresh = Box({"other": {"keys": 1}})
    checkpointer(tmp_path, box=fresh).load()
    assert fresh.state == state


def test_stores_an_objects_tensors_one_by_one(tmp_path: Path) -> None:
    state = {"average": {"w": torch.arange(3.0)}, "count": 5, "list": [torch.ones(2), {"x": 1}]}
    checkpointer(tmp_path, box=Box(state)).save(1)
    fresh = Box({"average": {"w": torch.zeros(3)}, "count": 0, "list": [torch.zeros(2), {"x": 0}]})
    checkpointer(tmp_path, box=fresh).load()
    assert torch.equal(fresh.state["average"]["w"], torch.arange(3.0))
    assert fresh.state["count"] == 5
    assert torch.equal(fresh.state["list"][0], torch.ones(2))
    assert fresh.state["list"][1] == {"x": 1}
    with pytest.raises(ValueError, match=r"another state of 'box': only one of them has objects\.box\.average\.w"):
        checkpointer(tmp_path, box=Box({"count": 0, "list": [torch.zeros(2), {"x": 0}]})).load()


def test_names_an_object_that_was_not_saved(tmp_path: Path) -> None:
    checkpointer(tmp_path, one=Box({"a": 1})).save(1)
    with pytest.raises(ValueError, match="saved without 'two'"):
        checkpointer(tmp_path, one=Box(), two=Box()).load()
    checkpointer(tmp_path).load()


def test_an_object_that_refuses_its_state_leaves_the_model_unchanged(tmp_path: Path) -> None:
    class Picky(Box):
        def load_state_dict(self, state: Any) -> None:
            raise ValueError("another run")

    checkpointer(tmp_path, box=Box({"a": 1})).save(1)
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="another run"):
        Checkpointer(tmp_path, model, optimizer, objects={"box": Picky()}).load()
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("plain_first", [True, False])
def test_loads_between_mechanic_and_its_plain_base(plain_first: bool, tmp_path: Path) -> None:
    def train(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int) -> None:
        for _ in range(steps):
            model(torch.ones(1, 2)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def make(plain: bool) -> tuple[nn.Linear, Any]:
        model = nn.Linear(2, 2)
        base = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, base if plain else Mechanic(base, variant="optax")

    model, optimizer = make(plain_first)
    train(optimizer, model, 5)
    Checkpointer(tmp_path, model, optimizer).save(5)
    other, resumed = make(not plain_first)
    train(resumed, other, 2)
    Checkpointer(tmp_path, other, resumed).load()
    assert torch.equal(other.weight, model.weight)
    assert resumed.state[other.weight]["step"] == 5
    assert torch.equal(resumed.state[other.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    if plain_first:
        assert resumed.scale.item() == pytest.approx(6e-6)
        train(resumed, other, 1)
        assert torch.equal(resumed.state[other.weight]["mechanic_x_ref"], model.weight)
    train(resumed, other, 1)
    assert resumed.state[other.weight]["step"] == (7 if plain_first else 6)


def test_a_refused_load_leaves_an_objects_tensors_unchanged(tmp_path: Path) -> None:
    def make(**options: Any) -> tuple[nn.Linear, nn.Linear, Checkpointer]:
        model, average = nn.Linear(2, 2), nn.Linear(2, 2)
        optimizer = Mechanic(torch.optim.AdamW(model.parameters()), **{"variant": "optax", **options})
        return model, average, Checkpointer(tmp_path, model, optimizer, objects={"average": average})

    make()[2].save(1)
    model, average, other = make(betas=(0.5, 0.6, 0.7, 0.8, 0.9, 0.95))
    before = model.weight.detach().clone(), average.weight.detach().clone()
    with pytest.raises(ValueError, match="other betas"):
        other.load()
    assert torch.equal(model.weight, before[0])
    assert torch.equal(average.weight, before[1])


@pytest.mark.parametrize("extra", [{"amax": 1.0, "n": 3}, 3], ids=str)
def test_restores_a_modules_extra_state(extra: Any, tmp_path: Path) -> None:
    class WithExtra(nn.Linear):
        def get_extra_state(self) -> Any:
            return extra

        def set_extra_state(self, state: Any) -> None:
            self.found = state

    for save in (True, False):
        model = WithExtra(2, 2)
        other = Checkpointer(tmp_path, model, torch.optim.SGD(model.parameters(), lr=1.0))
        if save:
            other.save(1)
        else:
            other.load()
            assert model.found == extra


def test_refuses_different_settings_in_one_group(tmp_path: Path) -> None:
    def make(*rates: float) -> tuple[Any, Checkpointer]:
        model = nn.Linear(2, 2)
        groups = [{"params": [p], "lr": rate} for p, rate in zip(model.parameters(), rates)]
        optimizer = torch.optim.SGD(groups or model.parameters(), lr=0.1)
        return optimizer, Checkpointer(tmp_path, model, optimizer)

    make(1.0, 5.0)[1].save(1)
    with pytest.raises(ValueError, match=r"other param groups: there weight has lr 1\.0 and bias has 5\.0"):
        make()[1].load()
    optimizer, other = make(2.0, 3.0)
    other.load()
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 5.0]


def test_warns_about_another_dtype(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpointer(tmp_path).save(1)
    model = nn.Linear(2, 2).bfloat16()
    Checkpointer(tmp_path, model, torch.optim.SGD(model.parameters())).load()
    assert "holds weight in torch.float32, the model in torch.bfloat16" in caplog.text


def test_retention_after_a_rollback(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    started = Checkpointer(tmp_path, model, torch.optim.SGD(model.parameters()), keep_latest=2)
    for step in (100, 200, 300):
        started.save(step)
    started.load(200)
    for step in (210, 220, 230):
        started.save(step)
    assert started.steps() == [220, 230, 300]


def test_accepts_any_integer_as_step(tmp_path: Path) -> None:
    class Seven:
        def __index__(self) -> int:
            return 7

    either = checkpointer(tmp_path)
    assert either.save(Seven()) == either.load(Seven()) == str(tmp_path / "step_00000007")  # type: ignore[arg-type]


def trained(steps: int, lr: Any = 1.0) -> tuple[nn.Linear, Mechanic]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = Mechanic(torch.optim.SGD(model.parameters(), lr=lr), variant="optax")
    take_steps(model, optimizer, steps)
    return model, optimizer


def take_steps(model: nn.Linear, optimizer: Mechanic, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()


def test_saves_a_numpy_learning_rate_as_a_number(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    model, optimizer = trained(2)
    optimizer.param_groups[0]["lr"] = numpy.float64(0.25)
    Checkpointer(tmp_path, model, optimizer).save(1)
    other, resumed = trained(0)
    Checkpointer(tmp_path, other, resumed).load()
    assert type(resumed.param_groups[0]["lr"]) is float
    assert resumed.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(("rows", "message"), [(7, "does not have schema 1"), (None, "has 8 rows, this one 9")])
def test_refuses_a_tuner_of_another_version(rows: int | None, message: str, tmp_path: Path) -> None:
    """The rows had no names before, and there were seven or eight."""
    model, optimizer = trained(5)
    for group in optimizer.param_groups:
        group["mechanic"] = group["mechanic"][:-1].clone() if rows is None else torch.rand(rows, 6).double()
    Checkpointer(tmp_path, model, optimizer).save(5)
    found = inspect(tmp_path / "step_00000005")
    assert found["tuners"][0]["variant"] == ("optax" if rows is None else "of another version")
    other, resumed = trained(0)
    with pytest.raises(ValueError, match=message):
        Checkpointer(tmp_path, other, resumed).load()


def test_refuses_a_tuner_with_other_betas(tmp_path: Path) -> None:
    model, optimizer = trained(2)
    Checkpointer(tmp_path, model, optimizer).save(2)
    other = nn.Linear(3, 2)
    few = Mechanic(torch.optim.SGD(other.parameters(), lr=1.0), betas=(0.9, 0.99), variant="optax")
    with pytest.raises(ValueError, match="the saved tuner has other betas"):
        Checkpointer(tmp_path, other, few).load()


@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_resumes_after_a_skipped_first_step(mode: str, tmp_path: Path) -> None:
    def bad_step(model: nn.Linear, optimizer: Mechanic) -> None:
        for p in model.parameters():
            p.grad = torch.full_like(p, float("nan"))
        with contextlib.suppress(NonfiniteError):
            optimizer.step()

    def make() -> tuple[nn.Linear, Mechanic]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, Mechanic(torch.optim.AdamW(model.parameters(), lr=1.0), nonfinite=mode, variant="optax")  # type: ignore[arg-type]

    model, optimizer = make()
    bad_step(model, optimizer)
    Checkpointer(tmp_path, model, optimizer).save(1)
    take_steps(model, optimizer, 3)
    other, resumed = make()
    Checkpointer(tmp_path, other, resumed).load()
    take_steps(other, resumed, 3)
    assert resumed.scale == optimizer.scale
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)
