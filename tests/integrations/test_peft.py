"""PEFT: LoRA finds the scale of a plain run, with one for A and one for B, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from manic.testing import run
from support.accelerated import STEPS, Accelerated, alone, be_torchrun, resume

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.usefixtures("new_processes")


def scales(scale: str) -> tuple[Any, Any]:
    be_torchrun()
    accelerated = Accelerated("DDP", lora=True, scale=scale)
    return accelerated.train(range(STEPS)), alone(2, lora=True, scale=scale)


@pytest.mark.framework("PEFT", "LoRA under Accelerate, 2 ranks, one scale, or one each for A and B: S of a plain run")
@pytest.mark.parametrize("scale", ["global", "per group"])
def test_lora_finds_the_scale_of_a_plain_run(scale: str) -> None:
    for found, expected in run(scales, 2, scale):
        for of_step, expected_of_step in zip(found, expected, strict=True):
            assert len(of_step) == (2 if scale == "per group" else 1)
            assert of_step == pytest.approx(expected_of_step, rel=1e-9)


@pytest.mark.framework("PEFT", "LoRA under Accelerate, 2 ranks: a resumed run ends bit for bit")
def test_lora_resumes_bit_for_bit(tmp_path: Path) -> None:
    run(resume, 2, str(tmp_path), "DDP", lora=True, scale="per group")
