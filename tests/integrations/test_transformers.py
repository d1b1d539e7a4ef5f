"""transformers' Trainer: S is that of a plain run, a resumed run ends bit for bit, and all logs have S * lr."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from manic import unwrap
from manic.testing import run, shutdown
from support.trainers import STEPS, alone, trainer

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")


@pytest.fixture(params=[1, 2], scope="module")
def world_size(request: pytest.FixtureRequest) -> Iterator[int]:
    """With new processes: Accelerate, below the Trainer, has one state for a whole process."""
    shutdown()
    yield request.param
    shutdown()


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
