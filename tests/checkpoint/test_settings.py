"""Settings of param groups are loaded by name: a tensor becomes a number and a number a tensor, as this run has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from manic import Mechanic
from manic.checkpoint import Checkpointer


class Scaled(torch.optim.SGD):
    """SGD with further settings, which a step does not read."""

    def __init__(self, parameters: Any, **settings: Any) -> None:
        super().__init__(parameters, lr=0.1)
        for group in self.param_groups:
            group.update(settings)


def make(kind: str, settings: dict[str, Any]) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    base = Scaled(model.parameters(), **settings)
    return model, Mechanic(base) if kind == "Mechanic" else base


def save_and_load(kind: str, saved: dict[str, Any], live: dict[str, Any], folder: Path) -> dict[str, Any]:
    model, optimizer = make(kind, saved)
    Checkpointer(folder, model, optimizer).save(1)
    other, resumed = make(kind, live)
    Checkpointer(folder, other, resumed).load()
    return resumed.param_groups[0]


CASES: list[tuple[Any, Any, Any]] = [
    # saved, live, loaded
    (0.5, torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)),
    (torch.tensor(0.5), 1.0, 0.5),
    (torch.tensor([0.5]), 1, 0.5),
    (torch.tensor(0.5), torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)),
    (torch.tensor([0.5]), torch.tensor(1.0), torch.tensor(0.5)),
    (torch.tensor(True), False, True),
    ((torch.tensor(0.5), 0.75), (0.9, 0.99), (0.5, 0.75)),
    ((0.5, 0.75), (torch.tensor(0.9), 0.99), (torch.tensor(0.5), 0.75)),
    ([torch.tensor(0.5), torch.tensor(0.75)], (0.9, 0.99), (0.5, 0.75)),
    ([0.5, 0.75], [torch.tensor(0.9), torch.tensor(0.99)], [torch.tensor(0.5), torch.tensor(0.75)]),
    ({"a": torch.tensor(0.5), "b": 1}, {"a": 0.9, "b": 2}, {"a": 0.5, "b": 1}),
    ({"a": 0.5, "b": 1}, {"a": torch.tensor(0.9), "b": 2}, {"a": torch.tensor(0.5), "b": 1}),
    ((1, 2, 3), (1, 2), (1, 2, 3)),
    ("cosine", None, "cosine"),
]


@pytest.mark.parametrize(("saved", "live", "loaded"), CASES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "Mechanic"])
def test_loads_a_setting_as_this_run_has_it(kind: str, saved: Any, live: Any, loaded: Any, tmp_path: Path) -> None:
    found = save_and_load(kind, {"setting": saved}, {"setting": live}, tmp_path)["setting"]
    assert repr(found) == repr(loaded)


@pytest.mark.parametrize("kind", ["plain", "Mechanic"])
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("saved", [0.5, torch.tensor(0.5)], ids=str)
def test_a_live_tensor_stays_the_same_object(saved: Any, name: str, kind: str, tmp_path: Path) -> None:
    live = torch.tensor(1.0)
    assert save_and_load(kind, {name: saved}, {name: live}, tmp_path)[name] is live
    assert live == 0.5


def test_groups_that_share_a_tensor_get_their_own_values(tmp_path: Path) -> None:
    def two(lrs: list[Any]) -> tuple[nn.Module, Optimizer]:
        model = nn.Linear(4, 4)
        groups = [{"params": [p], "lr": lr} for p, lr in zip(model.parameters(), lrs)]
        return model, Mechanic(torch.optim.SGD(groups, lr=1.0))

    Checkpointer(tmp_path, *two([0.5, 0.25])).save(1)
    shared = torch.tensor(1.0)
    model, optimizer = two([shared, shared])
    Checkpointer(tmp_path, model, optimizer).load()
    assert [group["lr"] for group in optimizer.param_groups] == [torch.tensor(0.5), torch.tensor(0.25)]


@pytest.mark.parametrize(("saved", "live"), [
    (torch.ones(3), 1.0), (None, torch.tensor(1.0)), ("linear", torch.tensor(1.0)), (torch.ones(3), torch.ones(2)),
    ((torch.tensor(0.5),), (0.9, 0.99)), ({"a": 1.0}, {"b": 1.0}), (torch.tensor(1.0), "linear"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["plain", "Mechanic"])
def test_refuses_what_cannot_be_converted(kind: str, saved: Any, live: Any, tmp_path: Path) -> None:
    model, optimizer = make(kind, {"setting": saved})
    Checkpointer(tmp_path, model, optimizer).save(1)
    other, resumed = make(kind, {"setting": live})
    with torch.no_grad():
        other.weight.zero_()
    with pytest.raises(ValueError, match=r"weight\.setting is .* in the checkpoint, which cannot become"):
        Checkpointer(tmp_path, other, resumed).load()
    assert not other.weight.any()
    assert resumed.param_groups[0]["setting"] is live


@pytest.mark.parametrize("kind", ["plain", "Mechanic"])
def test_loads_a_setting_that_this_run_does_not_have_yet(kind: str, tmp_path: Path) -> None:
    """A schedule adds ``initial_lr``, and is often made after the load."""
    found = save_and_load(kind, {"initial_lr": 0.5}, {}, tmp_path)
    assert found["initial_lr"] == 0.5
    model, optimizer = make("plain", {})
    Checkpointer(tmp_path, model, optimizer).load()
    assert "mechanic" not in optimizer.param_groups[0]


@pytest.mark.parametrize("kind", ["plain", "Mechanic"])
@pytest.mark.parametrize(("saved", "live"), [
    ([None, True], [None]), ([True, None], [True]), ([None], [None, True]), ([True], [None, None]),
], ids=str)  # fmt: skip
def test_keeps_what_this_run_declares_expert_parallel(
    saved: list[bool | None], live: list[bool | None], kind: str, tmp_path: Path
) -> None:
    """On one process, experts may share a group with others; the declaration is the program's."""

    def two(declared: list[bool | None], lr: float) -> tuple[nn.Module, Optimizer]:
        model = nn.Linear(4, 4)
        parts = [[p] for p in model.parameters()] if len(declared) == 2 else [list(model.parameters())]
        groups = [
            {"params": part, **({"expert_parallel": each} if each else {})} for part, each in zip(parts, declared)
        ]
        base = torch.optim.SGD(groups, lr=lr)
        return model, Mechanic(base) if kind == "Mechanic" else base

    Checkpointer(tmp_path, *two(saved, 0.5)).save(1)
    model, optimizer = two(live, 0.25)
    Checkpointer(tmp_path, model, optimizer).load()
    assert [group.get("expert_parallel") for group in optimizer.param_groups] == live
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
