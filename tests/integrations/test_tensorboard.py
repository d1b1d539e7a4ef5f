"""TensorBoard, and loggers like Weights & Biases, which take a dict of numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import manic
from support.problems import problem
from support.training import train

tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")


@pytest.mark.framework("TensorBoard", "S, S * lr and the other metrics, through `manic.integrations.tensorboard.log`")
def test_writes_the_metrics(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from manic.integrations.tensorboard import log

    parameters, loss = problem()
    optimizer = manic.AdamW(parameters, lr=0.5)
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        train(optimizer, loss, 5)
        log(writer, optimizer, step=5)
    written = EventAccumulator(str(tmp_path)).Reload()
    metrics = optimizer.metrics(to_host=True)
    assert set(written.Tags()["scalars"]) == {f"mechanic/{name}" for name in metrics}
    for name, value in metrics.items():
        (event,) = written.Scalars(f"mechanic/{name}")
        assert event.step == 5
        assert event.value == pytest.approx(value, rel=1e-6)
    assert metrics["effective_lr/0"] == 0.5 * metrics["scale"]


def test_metrics_are_what_a_logger_of_dicts_takes() -> None:
    parameters, loss = problem()
    optimizer = manic.AdamW(parameters)
    train(optimizer, loss, 5)
    metrics = optimizer.metrics(to_host=True)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
