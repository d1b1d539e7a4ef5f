"""torchao's optimizers with quantized states resume bit for bit; its quantized parameters are left alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from manic import Mechanic
from manic.checkpoint import Checkpointer
from manic.testing import run

optim = pytest.importorskip("torchao.optim", reason="torchao is not installed")
quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

BASES = ["AdamW8bit", "AdamW4bit", "AdamWFp8", "AdamW in bfloat16"]
"""The last: bfloat16 parameters and states, with stochastic rounding of the parameters."""


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def new(base: str, variant: str | None, seed: int, shards: bool = False) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))  # torchao quantizes from 4096 elements on
    if base == "AdamW in bfloat16":
        model.bfloat16()
    if shards:
        fully_shard(model)
    if base == "AdamW in bfloat16":
        optimizer = optim._AdamW(list(model.parameters()), lr=1e-2, bf16_stochastic_round=True)
    else:
        optimizer = getattr(optim, base)(list(model.parameters()), lr=1e-2)
    return model, optimizer if variant is None else Mechanic(optimizer, variant=variant, s_init=1e-2)


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).to(model[0].weight.dtype)
        optimizer.zero_grad()
        (model(x) - x.sin()).square().mean().backward()
        torch.manual_seed(step)  # of the stochastic rounding
        optimizer.step()


@pytest.mark.framework("torchao", "torch.distributed.checkpoint reads the state of a new optimizer")
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


@pytest.mark.framework("torchao", "8-bit, 4-bit, fp8 states, and bfloat16 with stochastic rounding: resume bit for bit")
@pytest.mark.parametrize("how", ["save", "async", "frozen"])
@pytest.mark.parametrize("variant", [None, "multiplicative", "optax"])
@pytest.mark.parametrize("base", BASES)
def test_resumes_bit_for_bit(base: str, variant: str | None, how: str) -> None:
    resume(base, variant, how, shards=False)


def resume_on_ranks(base: str, how: str) -> None:
    with torch.compiler.set_stance("force_eager"):
        resume(base, "multiplicative", how, shards=True)


@pytest.mark.framework("torchao", "the same under FSDP2 on 2 ranks")
@pytest.mark.parametrize(("base", "how"), [*((base, "save") for base in BASES), ("AdamW8bit", "async")])
def test_resumes_bit_for_bit_on_two_ranks(base: str, how: str) -> None:
    run(resume_on_ranks, 2, base, how)


def resume_with_dcp(base: str, shards: bool) -> None:
    """As :func:`resume`, by torch's functions alone."""
    with torch.compiler.set_stance("force_eager"):
        model, optimizer = new(base, "multiplicative", 0, shards)
        other, resumed = new(base, "multiplicative", 1, shards)
        train(model, optimizer, range(5))
        box = [tempfile.mkdtemp()]
        dist.broadcast_object_list(box)
        dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer))), checkpoint_id=box[0])
        state: dict[str, Any] = dict(zip(("model", "optimizer"), get_state_dict(other, resumed)))
        dcp.load(state, checkpoint_id=box[0])
        set_state_dict(other, resumed, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        for each in (model, optimizer), (other, resumed):
            train(*each, range(5, 8))
        assert resumed.scale == optimizer.scale
        for p, q in zip(model.parameters(), other.parameters()):
            assert torch.equal(p, q)


@pytest.mark.framework("torchao", "torch.distributed.checkpoint on 1 and 2 ranks: resume bit for bit")
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("base", BASES)
def test_resumes_bit_for_bit_with_torchs_functions(base: str, world_size: int) -> None:
    run(resume_with_dcp, world_size, base, world_size > 1)


@pytest.mark.framework("torchao", "bfloat16 with stochastic rounding: what the updates add up to is kept in float32")
def test_updates_of_stochastic_rounding_are_summed_in_float32() -> None:
    model, optimizer = new("AdamW in bfloat16", "multiplicative", 0)
    other, bare = new("AdamW in bfloat16", None, 0)
    start = [p.detach().double() for p in model.parameters()]
    total = [torch.zeros_like(x) for x in start]
    for step in range(20):
        before = [p.detach().double() for p in model.parameters()]
        with torch.no_grad():
            for p, q in zip(other.parameters(), model.parameters()):
                p.copy_(q)
        for each in (model, optimizer), (other, bare):
            train(*each, range(step, step + 1))
        for sum_, p, x in zip(total, other.parameters(), before):
            sum_ += float(optimizer.scale) * (p.detach().double() - x)
    for p, x, sum_ in zip(model.parameters(), start, total):
        state = optimizer.state[p]
        assert state["mechanic_x_ref"].dtype == state["mechanic_delta"].dtype == torch.float32
        there = state["mechanic_x_ref"].double() + state["mechanic_delta"].double()
        torch.testing.assert_close(there - x, sum_, rtol=0.0, atol=1e-5 * float(sum_.abs().max()))
        torch.testing.assert_close(p.double(), there, rtol=2**-8, atol=1e-9)
        assert float(sum_.abs().max()) > 0.01


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


@pytest.mark.framework("torchao", "frozen int8 and nf4 parameters beside trained ones")
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_parameters_are_left_alone(kind: str) -> None:
    run(train_beside_quantized, 2, kind)
