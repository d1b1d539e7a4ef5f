"""transformers' Trainer: S is that of a plain run, a resumed run ends bit for bit, and all logs have S * lr."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import manic
from manic import Mechanic, unwrap
from manic.testing import run, shutdown
from support.accelerated import be_torchrun

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

STEPS, BATCH = 12, 4


@pytest.fixture(params=[1, 2], scope="module")
def world_size(request: pytest.FixtureRequest) -> Iterator[int]:
    """With new processes: Accelerate, below the Trainer, has one state for a whole process."""
    shutdown()
    yield request.param
    shutdown()


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)).double()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layers(x) - y).square().mean()}


def data(world: int) -> list[dict[str, Tensor]]:
    x = torch.randn(STEPS * BATCH * world, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return [{"x": row, "y": row[:8].sin()} for row in x]


def groups_of(model: Net) -> list[dict[str, Any]]:
    """As the Trainer makes them."""
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        parts["bias" not in name].append(parameter)
    return [{"params": parts[True], "weight_decay": 0.1}, {"params": parts[False], "weight_decay": 0.0}]


def trainer(folder: str, given: str, seed: int = 0, **settings: Any) -> Any:
    from transformers import Trainer, TrainingArguments, get_cosine_schedule_with_warmup

    be_torchrun()
    model = Net(seed)
    arguments = TrainingArguments(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=BATCH, lr_scheduler_type="cosine",
        weight_decay=0.1, max_grad_norm=0.5, logging_steps=1, train_sampling_strategy="sequential", use_cpu=True,
        disable_tqdm=True, remove_unused_columns=False, label_names=["y"],
        **{"report_to": "none", "save_strategy": "no", **settings},
    )  # fmt: skip
    if given == "class":
        how: dict[str, Any] = {"optimizer_cls_and_kwargs": (manic.AdamW, {"lr": 1.0, "betas": (0.9, 0.95)})}
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


def scale_of(folder: str, given: str) -> tuple[float, float]:
    by_trainer = trainer(folder, given)
    by_trainer.train()
    return unwrap(by_trainer.optimizer).scale.item(), alone(dist.get_world_size())


@pytest.mark.framework("transformers", "Trainer, 1 and 2 ranks, given a class or an optimizer: S of a plain run")
@pytest.mark.parametrize("given", ["class", "objects"])
def test_finds_the_scale_of_a_plain_run(world_size: int, given: str, tmp_path: Path) -> None:
    for found, expected in run(scale_of, world_size, str(tmp_path), given):
        assert found == pytest.approx(expected, rel=1e-9)


def resume(folder: str) -> None:
    whole = trainer(folder, "class", save_strategy="steps", save_steps=STEPS // 2)
    whole.train()
    resumed = trainer(folder, "class", seed=1)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}")
    assert unwrap(whole.optimizer).scale == unwrap(resumed.optimizer).scale
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.framework("transformers", "Trainer, 1 and 2 ranks, resume_from_checkpoint: a resumed run ends bit for bit")
def test_resumes_bit_for_bit(world_size: int, tmp_path: Path) -> None:
    run(resume, world_size, str(tmp_path))


def logs_of(folder: str) -> tuple[list[dict[str, float]], dict[str, list[float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from manic.integrations.transformers import MechanicCallback

    by_trainer = trainer(folder, "class", report_to="tensorboard")
    MechanicCallback.add_to(by_trainer)
    by_trainer.train()
    files = [str(file) for file in Path(folder).rglob("events.out*")]
    written = EventAccumulator(files[0]).Reload()
    names = ("train/learning_rate", "train/scale", "train/base_learning_rate")
    return by_trainer.state.log_history, {name: [each.value for each in written.Scalars(name)] for name in names}


@pytest.mark.framework("transformers", "Trainer, its logs, also in TensorBoard: S, and S * lr as learning_rate")
@pytest.mark.usefixtures("new_processes")
def test_logs_have_the_effective_learning_rate(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    ((history, written),) = run(logs_of, 1, str(tmp_path))
    steps = [each for each in history if "learning_rate" in each]
    assert len(steps) == STEPS
    for index, each in enumerate(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * index / STEPS))
        assert each["base_learning_rate"] == pytest.approx(cosine)
        assert each["learning_rate"] == each["scale"] * each["base_learning_rate"]
    for name, values in written.items():
        assert values == pytest.approx([each[name.removeprefix("train/")] for each in steps], rel=1e-6)
    assert steps[-1]["scale"] > steps[0]["scale"] > 0
