"""Generated problems of sequences: language models, their fine-tuning, and recall."""

from __future__ import annotations

import pydoc_data
from functools import cache
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

from benchmarks.data import Make, sampled, text
from benchmarks.models import Adapter, Recurrent, Transformer, multiplier_of
from benchmarks.training import FIXED_SEED, loss_of

_PROSE = Path(pydoc_data.__file__).parent / "topics.py"
_HELD_OUT = 128  # sequences


def gpt(draw: Random) -> tuple[Make, str]:
    """A GPT on the bytes of Python's standard library."""
    width, depth, length = draw.choice((24, 32, 48)), draw.randint(1, 3), draw.choice((16, 32))
    batch_size, multiplier = draw.choice((4, 8, 16)), multiplier_of(draw)
    make = text(
        lambda: Transformer(256, 256, length, width, depth, multiplier, True), length, batch_size, None, _HELD_OUT
    )
    return make, f"GPT {depth}x{width}, code, {batch_size} x {length} bytes"


def lstm(draw: Random) -> tuple[Make, str]:
    """An LSTM or GRU on the bytes of Python's standard library."""
    kind, width, depth = draw.choice(("LSTM", "GRU")), draw.choice((24, 48)), draw.randint(1, 2)
    length, batch_size, multiplier = 16, draw.choice((4, 8, 16)), multiplier_of(draw)
    make = text(lambda: Recurrent(kind, 256, width, depth, multiplier), length, batch_size, None, _HELD_OUT)
    return make, f"{kind} {depth}x{width}, code, {batch_size} x {length} bytes"


_PRETRAINING = 400
_PRETRAINED = {"inputs": 256, "outputs": 256, "length": 32, "width": 32, "depth": 2, "multiplier": 1.0}


@cache
def _pretrained() -> dict[str, Tensor]:
    """A small GPT after :data:`_PRETRAINING` steps of AdamW on code."""
    problem = text(lambda: Transformer(**_PRETRAINED, is_causal=True), 32, 16, None, _HELD_OUT)(FIXED_SEED)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(problem.model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, _PRETRAINING)
    for _ in range(_PRETRAINING):
        optimizer.zero_grad()
        loss_of(problem.model, *next(problem.batches)).backward()
        optimizer.step()
        schedule.step()
    return problem.model.state_dict()


def _fine_tuned() -> Transformer:
    model = Transformer(**_PRETRAINED, is_causal=True)  # type: ignore[arg-type]
    model.load_state_dict(_pretrained())
    return model


def fine_tuning(draw: Random) -> tuple[Make, str]:
    """All of a GPT that was trained on code, fine-tuned on prose."""
    batch_size = draw.choice((2, 4, 8, 16))
    return text(_fine_tuned, 32, batch_size, _PROSE, _HELD_OUT), f"GPT 2x32, fine-tuned on prose, batch {batch_size}"


def lora(draw: Random) -> tuple[Make, str]:
    """Adapters of low rank on a frozen GPT that was trained on code, on prose."""
    batch_size, rank = draw.choice((4, 8, 16)), draw.choice((2, 8))

    def make() -> nn.Module:
        model = _fine_tuned().requires_grad_(False)
        for block in model.blocks:
            for name in ("qkv", "out", "up", "down"):
                setattr(block, name, Adapter(getattr(block, name), rank))
        return model

    return text(make, 32, batch_size, _PROSE, _HELD_OUT), f"LoRA of rank {rank} on a GPT, prose, batch {batch_size}"


def recall(draw: Random) -> tuple[Make, str]:
    """A transformer or GRU that repeats a random sequence, backwards or shifted in value."""
    tokens, length, width = draw.choice((8, 16)), draw.choice((4, 6)), draw.choice((24, 32))
    kind, batch_size, multiplier = draw.choice(("transformer", "GRU")), draw.choice((16, 64)), multiplier_of(draw)
    is_reversed, shift = draw.random() < 0.5, draw.choice((0, 3))

    def sample(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        shown = torch.randint(tokens, (count, length), generator=generator)
        answer = ((shown.flip(1) if is_reversed else shown) + shift) % tokens
        whole = torch.cat([shown, torch.full((count, 1), tokens), answer], dim=1)
        targets = whole[:, 1:].clone()
        targets[:, :length] = -100  # only the answer counts
        return whole[:, :-1], targets

    def make_model() -> nn.Module:
        if kind == "GRU":
            return Recurrent(kind, tokens + 1, width, 1, multiplier)
        return Transformer(tokens + 1, tokens + 1, 2 * length + 1, width, 2, multiplier, True)

    make = sampled(make_model, sample, batch_size, loss_of, 512)
    return make, f"{kind} {width}, repeats {length} of {tokens} tokens, batch {batch_size}"
