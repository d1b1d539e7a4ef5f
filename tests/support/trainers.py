"""A small run of transformers' Trainer on ranks, in float64, and the same run without it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import manic
from manic import Mechanic
from support.accelerated import be_torchrun

STEPS, BATCH = 12, 4


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)).double()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        dtype = next(self.parameters()).dtype
        return {"loss": (self.layers(x.to(dtype)) - y.to(dtype)).square().mean()}


def data(world: int) -> list[dict[str, Tensor]]:
    x = torch.randn(STEPS * BATCH * world, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return [{"x": row, "y": row[:8].sin()} for row in x]


def groups_of(model: Net) -> list[dict[str, Any]]:
    """As the Trainer makes them."""
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        parts["bias" not in name].append(parameter)
    return [{"params": parts[True], "weight_decay": 0.1}, {"params": parts[False], "weight_decay": 0.0}]


def trainer(folder: str, given: str, seed: int = 0, options: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A Trainer that is given a class or objects, with ``options`` of the class; with DeepSpeed in float32."""
    from transformers import Trainer, TrainingArguments, get_cosine_schedule_with_warmup

    be_torchrun()
    model = Net(seed).to(torch.float32 if "deepspeed" in settings else torch.float64)
    arguments = TrainingArguments(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=BATCH, lr_scheduler_type="cosine",
        weight_decay=0.1, max_grad_norm=0.5, logging_steps=1, train_sampling_strategy="sequential", use_cpu=True,
        disable_tqdm=True, remove_unused_columns=False, label_names=["y"],
        **{"report_to": "none", "save_strategy": "no", **settings},
    )  # fmt: skip
    if given == "class":
        how: dict[str, Any] = {
            "optimizer_cls_and_kwargs": (manic.AdamW, {"lr": 1.0, "betas": (0.9, 0.95), **(options or {})})
        }
    else:
        optimizer = Mechanic(torch.optim.AdamW(groups_of(model), lr=1.0, betas=(0.9, 0.95)))
        how = {"optimizers": (optimizer, get_cosine_schedule_with_warmup(optimizer, 0, STEPS))}
    return Trainer(model, arguments, train_dataset=data(dist.get_world_size()), **how)


def alone(world: int) -> float:
    """S of a plain run on all ranks' batches."""
    from transformers import get_cosine_schedule_with_warmup

    model = Net(0)
    mine = [dist.new_group([each]) for each in range(world)][dist.get_rank()]
    base = torch.optim.AdamW(groups_of(model), lr=1.0, betas=(0.9, 0.95))
    optimizer = Mechanic(base, process_group=mine)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 0, STEPS)
    rows = data(world)
    for start in range(0, len(rows), BATCH * world):
        part = rows[start : start + BATCH * world]
        optimizer.zero_grad()
        model(torch.stack([each["x"] for each in part]), torch.stack([each["y"] for each in part]))["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
    return optimizer.scale.item()
