"""A picture of a run from its metrics or its checkpoints, with what a person should look at."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from manic import Mechanic, report
from manic.checkpoint import Checkpointer
from manic.inspect import main


def write(path: Path, records: list[dict[str, Any]], *more: str) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + "".join(more))
    return path


def records(scale: Any, steps: int = 20) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 1.0 / step, "scale": scale(step)} for step in range(1, steps + 1)]


def train(folder: Path | None = None, steps: int = 6) -> tuple[list[dict[str, Any]], Mechanic]:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = Mechanic(torch.optim.AdamW(model.parameters(), lr=0.5))
    checkpointer = None if folder is None else Checkpointer(folder, model, optimizer)
    lines = []
    for step in range(1, steps + 1):
        loss = model(torch.randn(8, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        metrics = {name: value.item() for name, value in optimizer.metrics().items()}
        lines.append({"step": step, "loss": loss.item(), **metrics})
        if checkpointer is not None and step % 2 == 0:
            checkpointer.save(step)
    return lines, optimizer


def test_metrics_of_a_run_are_read_by_step(tmp_path: Path) -> None:
    lines, optimizer = train()
    run = report.read(write(tmp_path / "run.jsonl", lines))
    assert run.losses == {"loss": {line["step"]: line["loss"] for line in lines}}
    assert run.scales["scale"][6] == optimizer.scale.item()
    assert run.lrs["effective_lr/0"][6] == pytest.approx(0.5 * optimizer.scale.item())
    assert run.left_out == 0


@pytest.mark.parametrize("prefix", ["", "train/", "mechanic/"])
def test_a_prefix_and_a_scale_per_group_are_understood(prefix: str, tmp_path: Path) -> None:
    line = {
        "step": 3,
        "val_loss": 2,
        f"{prefix}scale/0": 0.1,
        f"{prefix}scale/1": 0.2,
        "time_scale_x": 7.0,
        "note": "a",
    }
    run = report.read(write(tmp_path / "run.jsonl", [line]))
    assert run.scales == {f"{prefix}scale/0": {3: 0.1}, f"{prefix}scale/1": {3: 0.2}}
    assert run.losses == {"val_loss": {3: 2.0}}


def test_a_resumed_run_counts_each_step_once_and_broken_lines_not(tmp_path: Path) -> None:
    again = [{"step": 2, "scale": 0.5}]
    run = report.read(
        write(tmp_path / "run.jsonl", records(lambda step: 0.1, 3) + again, '{"step": 4, "sca', "\n[1]\n")
    )
    assert run.scales == {"scale": {1: 0.1, 2: 0.5, 3: 0.1}}


def test_steps_may_be_whole_floats(tmp_path: Path) -> None:
    lines = [{"step": 1.0, "scale": 0.1}, {"step": 1.5, "scale": 0.2}, {"step": math.nan, "scale": 0.3}]
    assert report.read(write(tmp_path / "run.jsonl", lines)).scales == {"scale": {1: 0.1}}


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_the_scale_of_a_loss_scaler_is_not_taken_for_s(prefix: str, tmp_path: Path) -> None:
    line = {"step": 1, f"{prefix}scale": 0.1, f"{prefix}effective_lr/0": 0.01, "amp/scale": 65536.0}
    assert report.read(write(tmp_path / "run.jsonl", [line])).scales == {f"{prefix}scale": {1: 0.1}}


@pytest.mark.parametrize("count", [math.inf, math.nan])
def test_counts_that_are_not_finite_are_ignored(count: float, tmp_path: Path) -> None:
    lines = [{"step": 1, "scale": 0.1, "nonfinite_steps": 2}, {"step": 2, "scale": 0.1, "nonfinite_steps": count}]
    assert report.read(write(tmp_path / "run.jsonl", lines)).left_out == 2


def test_a_file_without_a_suffix_is_refused(tmp_path: Path) -> None:
    run = report.read(write(tmp_path / "run.jsonl", records(lambda step: 0.1)))
    with pytest.raises(ValueError, match=r"has no suffix: expected \.html"):
        report.draw(run, tmp_path / "picture")


def test_checkpoints_of_a_run_are_read(tmp_path: Path) -> None:
    lines, _ = train(tmp_path / "run")
    run = report.read(tmp_path / "run")
    assert run.scales["scale"] == {step: lines[step - 1]["scale"] for step in (2, 4, 6)}
    assert run.lrs["effective_lr/0"][6] == pytest.approx(lines[-1]["effective_lr/0"])
    assert run.losses == {}


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (lambda step: 1e-3 * min(step, 10), None),
        (lambda step: 1e-3 * 2.0**step, "scale does not settle"),
        (lambda step: 0.0, "scale is 0 in the second half of the run: nothing has moved"),
        (lambda step: math.nan, "scale is not finite"),
    ],
    ids=["settles", "rises", "stuck", "not finite"],
)
def test_a_scale_that_does_not_settle_is_warned_of(scale: Any, expected: str | None, tmp_path: Path) -> None:
    found = report.warnings(report.read(write(tmp_path / "run.jsonl", records(scale))))
    assert [each[: len(expected or "")] for each in found] == ([expected] if expected else [])


def test_a_loss_that_is_not_finite_and_steps_left_out_are_warned_of(tmp_path: Path) -> None:
    lines = [*records(lambda step: 0.1), {"step": 21, "loss": math.inf, "scale": 0.1, "nonfinite_steps": 3}]
    found = report.warnings(report.read(write(tmp_path / "run.jsonl", lines)))
    assert found == [
        "loss is not finite at the end.",
        "3 step(s) were left out or not learned from: their gradients were not finite.",
    ]


@pytest.mark.parametrize("suffix", [".html", ".png", ".svg"])
def test_it_is_drawn_by_one_command(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    lines = [{**line, "loss/<held out>": 1.0} for line in train()[0]]
    path, picture = write(tmp_path / "run.jsonl", lines), tmp_path / f"run{suffix}"
    assert main([str(path), "--plot", str(picture)]) == 0
    assert f"wrote {picture}" in capsys.readouterr().out
    assert picture.stat().st_size > 5_000
    if suffix == ".html":
        page = picture.read_text()
        assert "loss/&lt;held out&gt;" in page
        assert not re.search(r"(src|href)=\"(?!data:)", page)  # it needs no other file


def test_the_command_says_what_it_cannot_draw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without = write(tmp_path / "run.jsonl", [{"step": 1, "loss": 1.0}])
    assert main([str(without), "--plot", str(tmp_path / "run.html")]) == 2
    assert "has no S" in capsys.readouterr().err
    assert main([str(tmp_path / "absent"), "--plot", str(tmp_path / "run.html")]) == 2
    assert "neither a file of metrics nor a folder of checkpoints" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([str(write(without, records(lambda step: 0.1))), "--plot", str(tmp_path / "run.html")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
