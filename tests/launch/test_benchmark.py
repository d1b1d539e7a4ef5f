"""The benchmarks run, and their counts match the documentation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmark
from benchmarks import host, scale, step, train
from benchmarks.counting import CallCounter
from gpt.optimizers import Lion

TINY = scale.Llama(layers=2, width=256, hidden=512, keys=64, vocabulary=1024)


def test_step_writes_a_row_for_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = ["Mechanic(AdamW)", 'Mechanic(AdamW), variant="optax"']
    methods = [*waits, *(f'{method}, nonfinite="ignore"' for method in waits), "mechanic-pytorch"]
    found = tmp_path / "found.json"
    command = ["benchmark.py", "step", "--params", "1M", "--repeats", "2", "--device", "cpu", "--json", str(found)]
    monkeypatch.setattr(sys, "argv", [*command, "--methods", *methods])
    benchmark.main()
    rows = json.loads(found.read_text())["methods"]
    assert list(rows) == [step.REFERENCE, *methods]
    assert rows[step.REFERENCE]["ratio"] == 1
    assert all(row["seconds"] > 0 for row in rows.values())
    for method in methods[:4]:
        assert rows[method]["collectives"] == 1
        assert rows[method]["syncs"] == (1 if method in waits else 0)
    assert rows["mechanic-pytorch"]["collectives"] == 0
    assert rows["mechanic-pytorch"]["syncs"] > 0


@pytest.mark.parametrize("layout", scale.LAYOUTS.values(), ids=str)
def test_cost_per_rank_is_independent_of_world_size(layout: scale.Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    for world_size in (1024, 16384):
        calls: list[CallCounter] = []
        monkeypatch.setattr(scale, "CallCounter", lambda calls=calls: calls.append(CallCounter()) or calls[-1])
        cost = scale.measure(TINY, layout, world_size, repeats=1)
        assert cost.collectives == 1
        assert cost.own_bytes - cost.base_bytes < 10_000  # x_ref and Delta, as Adam has two; and the tuner
        assert cost.scratch <= 64 * 2**20
        steps.append(calls[0].counts["operators"])
    assert steps[0] == steps[1]


def test_host_writes_a_row_for_every_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(parameters: Any) -> Any:
        raise ValueError("a | b\nmore")

    methods = list(host.METHODS)
    monkeypatch.setitem(host.METHODS, "broken", broken)
    found = tmp_path / "found.json"
    command = ["benchmark.py", "host", "--layers", "1", "--ranks", "8", "--repeats", "2", "--json", str(found)]
    monkeypatch.setattr(sys, "argv", command)
    benchmark.main()
    written = json.loads(found.read_text())
    rows = written["methods"]
    assert written["tensors"] == 12
    assert list(rows) == [*methods, "broken"]
    assert rows.pop("broken") == {"seconds": None, "error": "ValueError: a | b\nmore", "ratio": None}
    assert rows[host.REFERENCE]["ratio"] == 1
    assert all(row["seconds"] > 0 and row["error"] is None for row in rows.values()), rows
    table = capsys.readouterr().out
    assert all(f"| {method} | " in table for method in methods)
    assert "| broken | raises ValueError: a \\| b | |" in table


def test_host_has_as_many_tensors_as_a_llama_of_32_layers() -> None:
    assert host.count(layers=32) == 291


def test_a_step_waits_for_a_delayed_all_reduce() -> None:
    at_once, late = step.latency_left("1M", delay=0.3, repeats=1)
    assert late > 0.25 > at_once


@pytest.mark.parametrize(("world_size", "hops"), [(1, 0), (8, 2), (16, 4), (1024, 16), (16384, 24)])
def test_hops_of_a_tree(world_size: int, hops: int) -> None:
    assert scale.hops(world_size, node=8) == hops


def test_train_compares_two_runs(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("to be or not to be\n" * 2000)
    extra = ["--device", "cpu", "--width", "32", "--layers", "1", "--heads", "2", "--data", str(tmp_path / "text")]
    found: dict[str, Any] = train.measure(ranks=1, steps=30, repeats=1, extra=extra)
    assert set(found) == {"none", "mechanic"}
    assert "| none |" in train.table(found)
    assert all(torch.tensor(speed) > 0 for speed in found.values())


def test_lion_updates_by_signs() -> None:
    parameter = torch.tensor([1.0, -1.0], requires_grad=True)
    optimizer = Lion([parameter], lr=0.1, weight_decay=0.5)
    parameter.grad = torch.tensor([3.0, -0.2])
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.95 - 0.1, -0.95 + 0.1]))
    parameter.grad = torch.tensor([-0.4, 0.2])  # does not change the sign of the stored average
    optimizer.step()
    # but changes that of the update's average: 0.9 * 0.03 - 0.1 * 0.4 < 0
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.85 * 0.95 + 0.1, -0.85 * 0.95 - 0.1]))
