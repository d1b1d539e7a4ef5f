"""What is asked of tensors is what subclasses and low precisions have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from manic import Mechanic
from manic.checkpoint import Checkpointer
from manic.distributed.parts import plain_parts
from manic.testing import run
from support.subclasses import Packed, PackedMoment


class Named(nn.Parameter):
    """A plain parameter of another class."""


class Closed(Packed):
    """A subclass that shows nothing of what it consists of."""

    __tensor_flatten__ = None  # type: ignore[assignment]


def test_plain_parts() -> None:
    plain = torch.arange(3.0)
    assert plain_parts(plain)[0] is plain
    assert [part.data_ptr() for part in plain_parts(Named(plain))] == [plain.data_ptr()]
    codes, total = plain_parts(Packed.pack(plain))
    assert (codes.dtype, codes.shape, float(total)) == (torch.uint8, (3,), 3.0)
    assert plain_parts(plain.to(torch.float8_e4m3fn))[0].dtype == torch.uint8
    assert plain_parts(plain.to(torch.bool))[0].dtype == torch.bool
    assert plain_parts(plain.to("meta")) == plain_parts(plain.to_sparse()) == []
    assert plain_parts(Closed(codes, total)) == []


def new(seed: int, plain: bool = False) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Linear(4, 3)
    base = PackedMoment(model.parameters(), lr=0.1)
    return model, base if plain else Mechanic(base, variant="multiplicative")


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x[:, :3].sin()).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("how", ["save", "async_save"])
def test_state_in_a_subclass_is_saved_and_loaded(how: str, plain: bool, tmp_path: Path) -> None:
    model, optimizer = new(0, plain)
    train(model, optimizer, range(4))
    checkpointer = Checkpointer(tmp_path, model, optimizer)
    getattr(checkpointer, how)(4)
    train(model, optimizer, range(4, 8))
    checkpointer.wait()
    other, resumed = new(1, plain)
    Checkpointer(tmp_path, other, resumed).load()
    assert type(resumed.state[other.weight]["moment"]) is Packed
    train(other, resumed, range(4, 8))
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)


def test_state_that_was_made_to_be_looked_at_is_distinguished_from_loaded_state() -> None:
    model, optimizer = new(0)
    get_optimizer_state_dict(model, optimizer)
    other, resumed = new(1)
    resumed.load_state_dict(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    for each in (model, optimizer), (other, resumed):
        train(*each, range(3))
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("is_fresh", [True, False])
def test_state_in_a_subclass_of_a_frozen_parameter(is_fresh: bool, tmp_path: Path) -> None:
    model, optimizer = new(0)
    train(model, optimizer, range(3))
    model.weight.requires_grad_(False)
    train(model, optimizer, range(3, 5))
    Checkpointer(tmp_path, model, optimizer).save(5)
    other, resumed = new(1)
    other.weight.requires_grad_(False)
    checkpointer = Checkpointer(tmp_path, other, resumed)
    if not is_fresh:
        train(other, resumed, range(1))
        with pytest.raises(ValueError, match=r"it would be of class Packed, .* Load into a new optimizer"):
            checkpointer.load()
        return
    checkpointer.load()
    found, saved = resumed.state[other.weight]["moment"], optimizer.state[model.weight]["moment"]
    assert type(found) is Packed
    assert torch.equal(found.unpacked(), saved.unpacked())


class Frozen(nn.Module):
    """A trainable layer, and frozen parameters that few operations work on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        values = torch.arange(6.0)
        tensors: list[Tensor] = [
            Packed.pack(values), Closed(values.to(torch.float8_e5m2), values.sum()), values.to(torch.float8_e4m3fn),
            values.to(torch.uint8), values.to(torch.bool),
        ]  # fmt: skip
        self.frozen = [nn.Parameter(each, requires_grad=False) for each in tensors]


def train_beside_frozen(differs: bool) -> None:
    model = Frozen()
    if differs and dist.get_rank():
        frozen: Any = model.frozen[0]
        frozen.codes.copy_(frozen.codes.float() + 1)
    optimizer = Mechanic(torch.optim.AdamW([*model.frozen, *model.layer.parameters()], lr=1.0))

    def step() -> None:
        model.layer(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.check_consistency()

    if differs:
        with pytest.raises(
            ValueError, match=r"parameter 0 of group 0, .*, a plain tensor, differs on other ranks.*leave frozen"
        ):
            step()
        return
    for _ in range(2):
        step()
    changed: Any = model.frozen[0]
    if dist.get_rank():
        changed.codes.copy_(changed.codes.float() + 1)
    with pytest.raises(RuntimeError, match=r"the value of parameter 0 of group 0, shape \(6,\) on rank"):
        optimizer.check_consistency()


@pytest.mark.parametrize("differs", [False, True])
def test_frozen_parameters_in_a_subclass_are_compared_and_left_alone(differs: bool) -> None:
    run(train_beside_frozen, 2, differs)
