"""heavyball's optimizers, which have a state dict of their own and a structured state, resume bit for bit."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from manic import Mechanic
from manic.checkpoint import Checkpointer

heavyball = pytest.importorskip("heavyball", reason="heavyball is not installed")


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):  # heavyball compiles its functions for minutes
        yield


def new(base: str, variant: str | None, seed: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    optimizer = getattr(heavyball, base)(list(model.parameters()), lr=1e-2, compile_step=False)
    return model, optimizer if variant is None else Mechanic(optimizer, variant=variant, s_init=1e-2)


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        x = torch.randn(8, 16)
        optimizer.zero_grad()
        (model(x) - x.sin()).square().mean().backward()
        optimizer.step()


@pytest.mark.framework("heavyball", "AdamW, SOAP, Muon: a resumed run ends bit for bit, by torch.save and Checkpointer")
@pytest.mark.parametrize("how", ["torch.save", "Checkpointer"])
@pytest.mark.parametrize("variant", [None, "multiplicative", "optax"])
@pytest.mark.parametrize("base", ["AdamW", "SOAP", "Muon"])
def test_resumes_bit_for_bit(base: str, variant: str | None, how: str, tmp_path: Path) -> None:
    model, optimizer = new(base, variant, 0)
    train(model, optimizer, range(5))
    other, resumed = new(base, variant, 1)
    if how == "Checkpointer":
        Checkpointer(tmp_path, model, optimizer).save(5)
        Checkpointer(tmp_path, other, resumed).load()
    else:
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        weights, saved = torch.load(file, weights_only=True)
        assert "heavyball" in saved
        other.load_state_dict(weights)
        resumed.load_state_dict(saved)
    for each in (model, optimizer), (other, resumed):
        train(*each, range(5, 9))
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)


@pytest.mark.framework("heavyball", "beside another optimizer, `Mechanic([first, second])`", limit="refused")
def test_refuses_heavyball_beside_another_base() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
    bases = [heavyball.AdamW(list(model[0].parameters())), torch.optim.AdamW(model[1].parameters())]
    with pytest.raises(TypeError, match=r"AdamW has a state_dict\(\) of its own"):
        Mechanic(bases)
