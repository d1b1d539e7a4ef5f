"""torchao's optimizers with quantized states resume bit for bit; its quantized parameters are left alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from manic import Mechanic
from manic.checkpoint import Checkpointer
from manic.testing import run

optim = pytest.importorskip("torchao.optim", reason="torchao is not installed")
quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

BASES = ["AdamW8bit", "AdamW4bit", "AdamWFp8"]


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def new(base: str, variant: str | None, seed: int, shards: bool = False) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))  # torchao quantizes from 4096 elements on
    if shards:
        fully_shard(model)
    optimizer = getattr(optim, base)(list(model.parameters()), lr=1e-2)
    return model, optimizer if variant is None else Mechanic(optimizer, variant=variant, s_init=1e-2)


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x.sin()).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("base", BASES)
def test_torchs_functions_read_the_state_of_a_new_optimizer(base: str) -> None:
    model, optimizer = new(base, "multiplicative", 0)
    get_optimizer_state_dict(model, optimizer)


def resume(base: str, variant: str | None, how: str, shards: bool) -> None:
    model, optimizer = new(base, variant, 0, shards)
    train(model, optimizer, range(5))
    model[0].requires_grad_(how != "frozen")
    train(model, optimizer, range(5, 6))
    box = [tempfile.mkdtemp()]
    if shards:
        dist.broadcast_object_list(box)
    checkpointer = Checkpointer(box[0], model, optimizer)
    if how == "async":
        checkpointer.async_save(6)
    else:
        checkpointer.save(6)
    checkpointer.wait()
    other, resumed = new(base, variant, 1, shards)
    other[0].requires_grad_(how != "frozen")
    Checkpointer(box[0], other, resumed).load()
    for each in (model, optimizer), (other, resumed):
        train(*each, range(6, 8))
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("how", ["save", "async", "frozen"])
@pytest.mark.parametrize("variant", [None, "multiplicative", "optax"])
@pytest.mark.parametrize("base", BASES)
def test_resumes_bit_for_bit(base: str, variant: str | None, how: str) -> None:
    resume(base, variant, how, shards=False)


def resume_on_ranks(base: str, how: str) -> None:
    with torch.compiler.set_stance("force_eager"):
        resume(base, "multiplicative", how, shards=True)


@pytest.mark.parametrize("how", ["save", "async"])
def test_resumes_bit_for_bit_on_two_ranks(how: str) -> None:
    run(resume_on_ranks, 2, "AdamW8bit", how)


def train_beside_quantized(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 3))
    model[0].requires_grad_(False)
    if kind == "int8":
        quantization.quantize_(model[0], quantization.Int8WeightOnlyConfig())
    else:
        model[0].weight = nn.Parameter(quantization.to_nf4(model[0].weight.detach()), requires_grad=False)
    optimizer = Mechanic(torch.optim.AdamW(model.parameters(), lr=1.0))
    for _ in range(3):
        model[1](torch.ones(2, 128)).square().sum().backward()
        optimizer.step()
        optimizer.check_consistency()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_parameters_are_left_alone(kind: str) -> None:
    run(train_beside_quantized, 2, kind)
