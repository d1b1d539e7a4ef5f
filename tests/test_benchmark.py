"""The benchmarks run, and what they count is what manic promises."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmark
import scale_cost
import step_cost
import train_cost

TINY = scale_cost.Llama(layers=2, width=256, hidden=512, keys=64, vocabulary=1024)


def test_step_writes_a_row_for_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = ["Mechanic(AdamW)", "Mechanic(AdamW), store_delta=False"]
    methods = [*waits, *(f'{method}, nonfinite="ignore"' for method in waits), "mechanic-pytorch"]
    found = tmp_path / "found.json"
    command = ["benchmark.py", "step", "--params", "1M", "--repeats", "2", "--device", "cpu", "--json", str(found)]
    monkeypatch.setattr(sys, "argv", [*command, "--methods", *methods])
    benchmark.main()
    rows = json.loads(found.read_text())["methods"]
    assert list(rows) == [step_cost.REFERENCE, *methods]
    assert rows[step_cost.REFERENCE]["ratio"] == 1
    assert all(row["seconds"] > 0 for row in rows.values())
    for method in methods[:4]:
        assert rows[method]["collectives"] == 1
        assert rows[method]["syncs"] == (1 if method in waits else 0)
    assert rows["mechanic-pytorch"]["collectives"] == 0
    assert rows["mechanic-pytorch"]["syncs"] > 0


@pytest.mark.parametrize("spread", scale_cost.SPREADS.values(), ids=str)
def test_a_step_costs_a_rank_the_same_in_any_world(spread: scale_cost.Spread, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    for world_size in (1024, 16384):
        calls: list[step_cost.Calls] = []
        monkeypatch.setattr(scale_cost, "Calls", lambda calls=calls: calls.append(step_cost.Calls()) or calls[-1])
        cost = scale_cost.measure(TINY, spread, world_size, repeats=1)
        assert cost.collectives == 1
        assert cost.own_bytes - cost.base_bytes < 10_000  # x_ref and Delta, as Adam has two; and the tuner
        assert cost.scratch <= 64 * 2**20
        steps.append(calls[0].counts["operators"])
    assert steps[0] == steps[1]


def test_a_delayed_all_reduce_is_waited_for_at_the_end() -> None:
    at_once, late = step_cost.latency_left("1M", delay=0.3, repeats=1)
    assert late > 0.25 > at_once


@pytest.mark.parametrize(("world_size", "hops"), [(1, 0), (8, 2), (16, 4), (1024, 16), (16384, 24)])
def test_hops_are_up_a_tree_and_down(world_size: int, hops: int) -> None:
    assert scale_cost.hops(world_size, node=8) == hops


def test_train_compares_two_runs(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("to be or not to be\n" * 2000)
    extra = ["--device", "cpu", "--width", "32", "--layers", "1", "--heads", "2", "--data", str(tmp_path / "text")]
    found: dict[str, Any] = train_cost.measure(ranks=1, steps=30, repeats=1, extra=extra)
    assert set(found) == {"none", "mechanic"}
    assert "| none |" in train_cost.table(found)
    assert all(torch.tensor(speed) > 0 for speed in found.values())
