"""Accelerate: S is that of a plain run, a resumed run ends bit for bit, and trackers get S and S * lr."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from manic import unwrap
from manic.testing import run, shutdown
from support.accelerated import STEPS, Accelerated, alone, be_torchrun, resume

pytest.importorskip("accelerate", reason="accelerate is not installed")


@pytest.fixture(params=["DDP", "FSDP2"], scope="module")
def layout(request: pytest.FixtureRequest) -> Iterator[str]:
    """In new processes: Accelerate has one state for a whole process."""
    shutdown()
    yield request.param
    shutdown()


def scales(layout: str, split: int) -> tuple[list[list[float]], list[list[float]]]:
    be_torchrun()
    return Accelerated(layout, split=split).train(range(STEPS)), alone(2)


@pytest.mark.framework("Accelerate", "DDP and FSDP2, 2 ranks, gradient accumulation and clipping: S of a plain run")
@pytest.mark.parametrize("split", [1, 3])
def test_finds_the_scale_of_a_plain_run(layout: str, split: int) -> None:
    for found, expected in run(scales, 2, layout, split):
        assert [s for (s,) in found] == pytest.approx([s for (s,) in expected], rel=1e-9)


@pytest.mark.framework("Accelerate", "DDP and FSDP2, 2 ranks, save_state, load_state: a resumed run ends bit for bit")
def test_resumes_bit_for_bit(layout: str, tmp_path: Path) -> None:
    run(resume, 2, str(tmp_path), layout)


def log_once() -> tuple[list[Any], float, float]:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    from manic.integrations.accelerate import log

    class Kept(GeneralTracker):
        name, requires_logging_directory, tracker = "kept", False, None
        logs: list[Any] = []

        def __init__(self) -> None:
            super().__init__()

        def store_init_configuration(self, values: dict[str, Any]) -> None: ...

        def log(self, values: dict[str, Any], step: int | None, **kwargs: Any) -> None:
            self.logs.append((values, step))

    be_torchrun()
    run_ = Accelerated("DDP")
    run_.train(range(STEPS // 2))
    accelerator = Accelerator(cpu=True, log_with=Kept())
    accelerator.init_trackers("run")
    log(accelerator, {"loss": 2.0}, run_.optimizer, step=3)
    mechanic = unwrap(run_.optimizer)
    return Kept.logs, mechanic.scale.item(), mechanic.param_groups[0]["lr"]


@pytest.mark.framework("Accelerate", "trackers get S and S * lr, through `manic.integrations.accelerate.log`")
@pytest.mark.usefixtures("new_processes")
def test_trackers_get_the_effective_learning_rate() -> None:
    (logs, scale, lr), (of_other_rank, *_) = run(log_once, 2)
    ((values, step),) = logs
    assert step == 3
    assert values["loss"] == 2.0
    assert values["scale"] == scale
    assert values["effective_lr/0"] == scale * lr
    assert 0 < lr < 1
    assert all(type(value) is float for value in values.values())
    assert of_other_rank == []
