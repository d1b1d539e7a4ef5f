"""transformers' Trainer with DeepSpeed: the param groups that it makes share one scale, that of a plain run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from manic import unwrap
from manic.testing import run
from support.deepspeed_runs import begin
from support.trainers import STEPS, alone, trainer

for package in ("transformers", "accelerate", "deepspeed"):
    pytest.importorskip(package, reason=f"{package} is not installed")


pytestmark = pytest.mark.usefixtures("processes_of_its_own")


def with_deepspeed(folder: str, stage: int, seed: int = 0, **settings: Any) -> Any:
    """As its page says."""
    from manic.integrations.transformers import MechanicCallback

    begin()
    config = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto", "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }  # fmt: skip
    by_trainer = trainer(folder, "class", seed, {"plain": "sharded"}, deepspeed=config, **settings)
    MechanicCallback.add_to(by_trainer)
    return by_trainer


def scale_and_resume(folder: str, stage: int) -> tuple[float, float]:
    whole = with_deepspeed(folder, stage, save_strategy="steps", save_steps=STEPS // 2)
    whole.train()
    resumed = with_deepspeed(folder, stage, seed=1)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}")
    scale = unwrap(whole.optimizer).scale.item()
    assert unwrap(resumed.optimizer).scale.item() == scale
    return scale, alone(dist.get_world_size())


@pytest.mark.framework("transformers", "Trainer with DeepSpeed, ZeRO-2 and 3, 2 ranks: S of a plain run; resumes")
@pytest.mark.parametrize("stage", [2, 3])
def test_with_deepspeed(stage: int, tmp_path: Path) -> None:
    for found, expected in run(scale_and_resume, 2, str(tmp_path), stage, timeout=280.0):
        assert found == pytest.approx(expected, rel=1e-5)
