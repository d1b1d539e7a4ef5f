"""The benchmarks run, and their counts match the documentation."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmark
from benchmarks import host, scale, step, tasks, train, tuning, tuning_report
from gpt.optimizers import Lion

TINY = scale.Llama(layers=2, width=256, hidden=512, keys=64, vocabulary=1024)


def test_step_writes_a_row_for_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = ["Mechanic(AdamW)", 'Mechanic(AdamW), variant="optax"']
    waits.append('Mechanic(AdamW), variant="optax", store_delta=False')
    methods = [*waits, *(f'{method}, nonfinite="ignore"' for method in waits), "mechanic-pytorch"]
    found = tmp_path / "found.json"
    command = ["benchmark.py", "step", "--params", "1M", "--repeats", "2", "--device", "cpu", "--json", str(found)]
    monkeypatch.setattr(sys, "argv", [*command, "--methods", *methods])
    benchmark.main()
    rows = json.loads(found.read_text())["methods"]
    assert list(rows) == [step.REFERENCE, *methods]
    assert rows[step.REFERENCE]["ratio"] == 1
    assert all(row["seconds"] > 0 for row in rows.values())
    for method in methods[:6]:
        assert rows[method]["collectives"] == 1
        assert rows[method]["syncs"] == (1 if method in waits else 0)
    assert rows["mechanic-pytorch"]["collectives"] == 0
    assert rows["mechanic-pytorch"]["syncs"] > 0


@pytest.mark.parametrize("layout", scale.LAYOUTS.values(), ids=str)
def test_cost_per_rank_is_independent_of_world_size(layout: scale.Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    for world_size in (1024, 16384):
        calls: list[step.CallCounter] = []
        monkeypatch.setattr(scale, "CallCounter", lambda calls=calls: calls.append(step.CallCounter()) or calls[-1])
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


def loss_by(lrs: dict[float, float], seed: int = 0, method: str = tuning.SWEEP) -> tuning.Results:
    return {tuning.Run("gpt", method, lr, seed): tuning.Result(loss, [], 1.0) for lr, loss in lrs.items()}


@pytest.mark.parametrize("best", [-6, -1, 0, 2, 5])
def test_the_grid_grows_until_its_best_is_inside(best: int) -> None:
    task = tasks.TASKS["gpt"]
    losses = {task.guess * 2.0**power: 1.0 + abs(power - best) for power in range(-20, 21)}
    results: tuning.Results = {}
    while missing := [run for run in tuning.wanted(task, [tuning.SWEEP], [0], results) if run not in results]:
        results |= loss_by({run.lr: losses[run.lr] for run in missing})
    grid = sorted(run.lr for run in results)
    assert all(b == 2 * a for a, b in itertools.pairwise(grid))
    at = grid.index(task.guess * 2.0**best)
    assert 2 <= at <= len(grid) - 3
    assert len(grid) <= 5 + abs(best)


def test_the_table_takes_the_mean_over_seeds_and_the_best_of_the_grid() -> None:
    task = tasks.TASKS["gpt"]
    lrs = [task.guess * 2.0**power for power in range(-2, 3)]
    results = {
        **loss_by(dict(zip(lrs, [5.0, 3.0, 2.0, 3.0, 5.0])), 0),
        **loss_by(dict(zip(lrs, [5.0, 3.2, 4.0, 5.0, 5.0])), 1),
        **loss_by({1.0: 3.0}, 0, "optax"), **loss_by({1.0: 3.6}, 1, "optax"),
        **loss_by({1.0: 3.0}, 0, "Prodigy"), **loss_by({1.0: float("inf")}, 1, "Prodigy"),
        **{run: result for lr in tuning.BASE_LRS for seed in (0, 1)
           for run, result in loss_by({lr: 3.0 if lr < 1 else 3.3}, seed, tuning.TUNER).items()},
    }  # fmt: skip
    (row,) = tuning_report.rows(results, ["gpt", "gpt-sgd"], list(tuning.METHODS), [0, 1])
    assert (row.best_lr, row.best_loss) == (task.guess, 3.0)
    assert row.excess == pytest.approx({"optax": 0.1, "Prodigy": float("inf"), tuning.TUNER: 0.1})
    assert row.spread == pytest.approx(0.1)
    table = tuning_report.table([row], list(tuning.METHODS))
    assert "| +10.0% | +10.0% | broke | 10.00% |" in table
    assert "D-Adaptation" not in table


# The extra "test" installs only mechanic-pytorch of the peers; the extra "bench" installs the others.
PEERS = {"Prodigy": "prodigyopt", "D-Adaptation": "dadaptation", "Schedule-Free": "schedulefree"}


@pytest.mark.parametrize("with_peers", [False, True])
def test_every_method_trains_and_a_stopped_benchmark_continues(
    with_peers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in PEERS.values() if with_peers else ():
        pytest.importorskip(package)
    methods = [method for method in tuning.METHODS if with_peers or method not in PEERS]
    short = dataclasses.replace(tasks.TASKS["gpt"], steps=3)
    monkeypatch.setitem(tasks.TASKS, "gpt", short)
    monkeypatch.setattr(tasks, "HELD_OUT", 4)
    results, image = tmp_path / "deep" / "results.jsonl", tmp_path / "plot.png"
    command = ["benchmark.py", "tuning", "--tasks", "gpt", "--seeds", "1", "--processes", "1"]
    command += ["--results", str(results), "--methods", *methods]
    monkeypatch.setattr(sys, "argv", [*command, "--plot", str(image)])
    benchmark.main()
    whole = results.read_text().splitlines()
    assert {json.loads(line)["method"] for line in whole} == set(methods)
    assert all(4.5 < json.loads(line)["loss"] < 6.0 for line in whole)  # 256 equally likely bytes have 5.55
    assert image.stat().st_size > 1000

    ran: list[tuning.Run] = []
    execute = tuning.execute
    monkeypatch.setattr(tuning, "execute", lambda run: ran.append(run) or execute(run))
    results.write_text("\n".join(whole[:-1]) + "\n" + whole[-1][:20])
    benchmark.main()
    assert [run.method for run in ran] == [json.loads(whole[-1])["method"]]
    again = tuning.read(results)
    assert [json.loads(line)["loss"] for line in whole] == [result.loss for result in again.values()]
    assert "| **worst** |" in capsys.readouterr().out


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
