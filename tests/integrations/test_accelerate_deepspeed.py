"""Accelerate with DeepSpeed: the param groups share one scale, that of a plain run, and a resumed run ends alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from manic.testing import run
from support.accelerated import STEPS, Accelerated, alone, be_torchrun, resume

for package in ("accelerate", "deepspeed"):
    pytest.importorskip(package, reason=f"{package} is not installed")


pytestmark = pytest.mark.usefixtures("processes_of_its_own")


def scales(layout: str) -> tuple[list[list[float]], list[list[float]]]:
    be_torchrun()
    return Accelerated(layout).train(range(STEPS)), alone(2)


@pytest.mark.framework("Accelerate", "DeepSpeed's ZeRO-2 and 3, 2 ranks: S of a plain run")
@pytest.mark.parametrize("layout", ["ZeRO-2", "ZeRO-3"])
def test_finds_the_scale_of_a_plain_run(layout: str) -> None:
    for found, expected in run(scales, 2, layout, timeout=280.0):
        assert [s for (s,) in found] == pytest.approx([s for (s,) in expected], rel=1e-5)


@pytest.mark.framework("Accelerate", "DeepSpeed's ZeRO-2 and 3, 2 ranks: a resumed run ends bit for bit")
@pytest.mark.parametrize("layout", ["ZeRO-2", "ZeRO-3"])
def test_resumes_bit_for_bit(layout: str, tmp_path: Path) -> None:
    run(resume, 2, str(tmp_path), layout, timeout=280.0)
