"""Cost of a checkpoint with FSDP2, with and without Mechanic: bytes, seconds, seconds that training waits, memory."""

from __future__ import annotations

import functools
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from benchmarks.host_memory import peak, reset_peak
from gpt.model import GPT
from manic import Mechanic
from manic.checkpoint import Checkpointer
from manic.testing import run

SEQ_LEN = 64
# Width and number of blocks of a GPT, by approximate number of parameters.
SIZES = {"1M": (128, 5), "25M": (512, 8), "124M": (768, 17), "1B": (2048, 20)}


OPTIMIZERS = ("AdamW", "Mechanic(AdamW)")


def measure(name: str, width: int, layers: int, directory: str | None, repeats: int) -> dict[str, float]:
    """Measure on every rank; times are medians of ``repeats`` in seconds, sizes are in bytes."""
    box = [tempfile.mkdtemp(dir=directory)]
    dist.broadcast_object_list(box)
    folder = Path(box[0])
    torch.manual_seed(0)
    model = GPT(256, SEQ_LEN, layers, width, heads=width // 64)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    base = torch.optim.AdamW(model.parameters(), lr=1.0, fused=True)
    optimizer = base if name == "AdamW" else Mechanic(base)
    model(torch.randint(256, (1, SEQ_LEN))).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    checkpointer = Checkpointer(folder, model, optimizer, keep_latest=1)
    steps = iter(range(1000))
    try:
        found: dict[str, float] = {}
        checkpointer.save(next(steps))  # creates the process group and touches the first pages
        before = reset_peak()
        found["save"] = median(lambda: checkpointer.save(next(steps)), repeats)
        found["save_memory"] = peak() - before
        reset_peak()
        checkpointer.async_save(next(steps))
        checkpointer.wait()
        found["async_memory"] = peak() - before
        found["async_blocked"] = median(lambda: checkpointer.async_save(next(steps)), repeats, checkpointer.wait)
        for verify in ("full", "size"):
            found[f"load_{verify}"] = median(functools.partial(checkpointer.load, verify=verify), repeats)
        latest = Path(checkpointer.path(max(checkpointer.steps())))
        found["bytes"] = sum(file.stat().st_size for file in latest.iterdir())
        found["shard"] = (latest / f"__{dist.get_rank()}_0.distcp").stat().st_size
        dist.barrier()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def median(action: Callable[[], Any], repeats: int, after: Callable[[], Any] = lambda: None) -> float:
    """Median duration of ``action`` in seconds; ``after`` is not counted."""
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
        after()
    return statistics.median(seconds)


def table(sizes: dict[str, tuple[int, int]], ranks: list[int], directory: str | None, repeats: int) -> str:
    """A Markdown table with one line for each size, number of ranks and optimizer."""
    heads = [
        "parameters", "ranks", "", "on disk", "largest shard", "`save`", "`async_save` blocks", "share", "`load`",
        '`load`, `verify="size"`', "memory of `save`", "of `async_save`",
    ]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for size, (width, layers) in sizes.items():
        for world_size, name in itertools.product(ranks, OPTIMIZERS):
            each = run(measure, world_size, name, width, layers, directory, repeats, timeout=1800)
            # A run waits for its slowest rank.
            worst = {key: max(found[key] for found in each) for key in each[0]}
            cells = [
                size, str(world_size), name, megabytes(worst["bytes"]), megabytes(worst["shard"]),
                f"{worst['save']:.2f} s", f"{worst['async_blocked']:.2f} s",
                f"{worst['async_blocked'] / worst['save']:.0%}", f"{worst['load_full']:.2f} s",
                f"{worst['load_size']:.2f} s", megabytes(worst["save_memory"]), megabytes(worst["async_memory"]),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def megabytes(count: float) -> str:
    """A number of bytes in MB."""
    return f"{count / 1e6:,.0f} MB"
