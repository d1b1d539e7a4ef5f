"""The benchmark of tuning: which runs it makes, which results count, and what its tables say."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmark
from benchmarks import (
    data,
    fixed_lr,
    generated,
    ladder,
    ladder_report,
    methods,
    profile,
    results,
    sweep,
    tasks,
    training,
    tuning,
    tuning_report,
)


def loss_by(
    lrs: dict[float, float], seed: int = 0, method: str = methods.SWEEP, task: str = "gpt", start: float = 5.5
) -> results.Results:
    return {results.Run(task, method, lr, seed): results.Result(loss, start, [], 1.0) for lr, loss in lrs.items()}


def grid_by(
    losses: Callable[[float], float], task: training.Task, seed: int = 0, start: float = 5.5
) -> results.Results:
    """The sweep of a task whose loss is a function of the power of 2 of the learning rate over the guess."""
    found: results.Results = {}
    while missing := [run for run in tuning.wanted(task, [methods.SWEEP], [seed], found) if run not in found]:
        lrs = {run.lr: losses(math.log2(run.lr / task.guess)) for run in missing}
        found |= loss_by(lrs, seed, task=task.name, start=start)
    return found


def _ends_at(best: float) -> Callable[[float], float]:
    """Losses of which the smallest is at this power of 2."""
    return lambda power: 2.0 + abs(power - best)


@pytest.mark.parametrize(("name", "first"), [("gpt", {-2, -1, 0, 1, 2}), ("g0", {-4, -2, 0, 2, 4})])
@pytest.mark.parametrize("best", [-6, -1, 0, 2, 5])
def test_the_grid_grows_until_its_best_is_inside(best: int, name: str, first: set[int]) -> None:
    task = results.task_of(name)
    found = grid_by(lambda power: 1.0 + abs(power - best), task)
    powers = sorted(math.log2(run.lr / task.guess) for run in found)
    assert first <= set(powers)
    at = powers.index(best)
    assert powers[at - 2 : at + 3] == [best - 2, best - 1, best, best + 1, best + 2]
    assert len(powers) <= 9 + abs(best) / 2


def test_the_table_takes_the_mean_over_seeds_and_the_best_of_the_grid() -> None:
    task = tasks.TASKS["gpt"]
    lrs = [task.guess * 2.0**power for power in (-4, -2, -1, 0, 1, 2, 4)]
    found = {
        **loss_by(dict(zip(lrs, [9.0, 5.0, 3.0, 2.0, 3.0, 5.0, 9.0])), 0),
        **loss_by(dict(zip(lrs, [9.0, 5.0, 3.2, 4.0, 5.0, 5.0, 9.0])), 1),
        **loss_by({1.0: 3.0}, 0, "optax"), **loss_by({1.0: 3.6}, 1, "optax"),
        **loss_by({1.0: 3.0}, 0, "Prodigy"), **loss_by({1.0: float("inf")}, 1, "Prodigy"),
        **{run: result for lr in methods.BASE_LRS for seed in (0, 1)
           for run, result in loss_by({lr: 3.0 if lr < 1 else 3.3}, seed, methods.TUNER).items()},
    }  # fmt: skip
    (row,) = tuning_report.rows(found, ["gpt", "gpt-sgd"], methods.NAMED_METHODS, [0, 1])
    assert (row.sweep.best_lr, row.sweep.best) == (task.guess, 3.0)
    assert row.excess == pytest.approx({"optax": 0.1, "Prodigy": float("inf"), methods.TUNER: 0.1})
    assert row.spread == pytest.approx(0.1)
    assert row.noise == pytest.approx(2**0.5 / 3)
    table = tuning_report.table([row], methods.NAMED_METHODS)
    assert "| +10.0% | +10.0% | broke | 10.00% |" in table
    assert "D-Adaptation" not in table
    summary = tuning_report.summary_table([row], methods.NAMED_METHODS)
    whole = "+100.0% (+10.0%) | broke (+10.0%) | 0% (0%) | 0% (0%) | 0% (0%) | 0% (100%) | +0% |"
    assert f"| Prodigy | 1 | broke (+10.0%) | {whole}" in summary


def test_excess_is_relative_or_a_share_of_the_way_in_the_logarithm() -> None:
    named, other = tasks.TASKS["gpt"], dataclasses.replace(tasks.TASKS["gpt"], name="g0")
    assert sweep.excess(named, 0.011, 0.01, start=5.0) == pytest.approx(0.1)
    assert sweep.excess(other, 2.02, 2.0, start=5.0) == pytest.approx(math.log(1.01))
    assert sweep.excess(other, 1e-4, 1e-6, start=1.0) == pytest.approx(1 / 3)
    assert sweep.excess(other, 0.0, 1e-12, start=1.0) == 0.0
    assert sweep.excess(other, math.inf, 1e-12, start=1.0) == math.inf


def a_sweep(name: str, base: str, losses: dict[float, float]) -> sweep.Sweep:
    return sweep.Sweep(dataclasses.replace(tasks.TASKS["gpt"], name=name, base=base), losses, 5.0)


def test_the_fixed_learning_rate_is_the_best_on_the_other_tasks_of_the_family() -> None:
    low = {0.25: 2.2, 0.5: 2.0, 1.0: 2.1, 2.0: 2.3, 4.0: 3.0}
    high = {0.5: 3.5, 1.0: 2.2, 2.0: 2.1, 4.0: 2.0, 8.0: 2.1}
    found = fixed_lr.fixed_lrs([
        a_sweep("a", "adam", low), a_sweep("b", "adamw", low), a_sweep("c", "rmsprop", high),
        a_sweep("d", "sgd", low), a_sweep("e", "momentum", high), a_sweep("f", "lion", low),
    ])  # fmt: skip
    assert found == {"a": 1.0, "b": 1.0, "c": 0.5, "d": 4.0, "e": 0.5}


def test_between_and_beyond_the_points_of_a_grid() -> None:
    found = a_sweep("a", "adam", {1.0: 2.2, 4.0: 2.0, 16.0: 200.0})
    assert fixed_lr.capped(found, 0.01) == pytest.approx(math.log(1.1))
    assert fixed_lr.capped(found, 2.0) == pytest.approx(math.log(1.1) / 2)
    assert fixed_lr.capped(found, 4.0) == 0.0
    assert fixed_lr.capped(found, 8.0) == pytest.approx(0.5)
    assert fixed_lr.capped(found, 100.0) == 1.0


def test_a_fixed_learning_rate_is_measured_once_the_grids_are_complete() -> None:
    first, second = (dataclasses.replace(tasks.TASKS["gpt"], name=name, guess=1.0) for name in ("g0", "g1"))
    low, high = (grid_by(_ends_at(at), first, start=5.5) for at in (-7, 7))
    found = low | {dataclasses.replace(run, task="g1"): result for run, result in high.items()}
    used = ([first, second], [methods.FIXED], [0])
    one = dict(list(found.items())[:-1])
    assert [run.task for run in tuning.missing(*used, one, [1.0])] == ["g1"]
    runs = tuning.missing(*used, found, [1.0])
    assert runs == [results.Run("g0", methods.SWEEP, 2.0**7, 0), results.Run("g1", methods.SWEEP, 2.0**-7, 0)]
    found |= {run: results.Result(8.0, 5.5, [], 1.0) for run in runs}
    assert tuning.missing(*used, found, [1.0]) == []


def test_results_of_other_code_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.jsonl"
    runs = [
        results.Run("gpt", methods.TUNER, 1.0, 0), results.Run("gpt", "optax", 1.0, 0),
        results.Run("g1", methods.SWEEP, 0.5, 1), results.Run("ladder-mlp-wsd-300", methods.SWEEP, 0.5, 1),
    ]  # fmt: skip
    lines = [results.line(run, results.Result(math.inf, 5.5, [(1, 0.5)], 1.0)) for run in runs]
    undated = json.loads(lines[0]) | {"seed": 1}
    del undated["digest"]
    file.write_text("".join(lines) + json.dumps(undated) + "\n" + lines[0][:-10])
    assert results.read(file) == {run: results.Result(math.inf, 5.5, [(1, 0.5)], 1.0) for run in runs}
    changed = dataclasses.replace(methods.METHODS[methods.TUNER], modules=("manic.tuners.mechanic",))
    monkeypatch.setitem(methods.METHODS, methods.TUNER, changed)
    assert set(results.read(file)) == set(runs[1:])
    monkeypatch.setattr(results, "_GENERATED", ("benchmarks.generated",))
    assert set(results.read(file)) == {runs[1], runs[3]}


def test_numbers_of_a_profile() -> None:
    own, other = [-0.01, 0.0, 0.015, 0.04], [0.005, 0.03, 0.2, math.inf]
    found = profile.summary(other)
    assert (found.count, found.worst) == (4, math.inf)
    assert found.median == pytest.approx(0.115)
    assert found.mean == pytest.approx((0.005 + 0.03 + 0.2 + 1.0) / 4)
    assert found.within == (0.25, 0.25, 0.5, 0.5)
    assert [profile.share_within(own, limit) for limit in (-0.02, 0.0, 0.01, 0.05)] == [0.0, 0.5, 0.5, 1.0]
    assert profile.least_lead(own, other) == 0.25
    assert profile.least_lead(other, own) == -0.5
    assert profile.least_lead([0.0, 0.01], [0.0, 0.3]) == 0.5
    assert profile.least_lead(own, own) == 0.0


def test_a_generated_task_is_its_seed() -> None:
    found = [generated.generated(seed) for seed in range(48)]
    assert len({task.what for task in found}) == 48
    assert {task.base for task in found} == set(fixed_lr.FAMILIES)
    again = generated.generated.__wrapped__(2)
    settings = ("name", "what", "base", "steps", "guess", "schedule", "warm_up", "clip", "gradient_noise")
    assert all(getattr(again, name) == getattr(found[2], name) for name in settings)
    first, second = again.problem(0), found[2].problem(0)
    assert first.mean_loss() == second.mean_loss()
    assert all(torch.equal(a, b) for a, b in zip(next(first.batches), next(second.batches)))
    assert results.task_of("g2") is found[2]


@pytest.mark.parametrize(
    ("option", "first", "last", "count"),
    [
        (["--generated"], "g0", "g47", 48),
        (["--generated-seeds", "3", "5"], "g3", "g4", 2),
        (["--held-out"], "g1000", "g1031", 32),
        (["--ladder"], "ladder-gpt-constant-300", "ladder-mlp-wsd-30000", 30),
        (["--tasks", "mlp", "convex"], "mlp", "convex", 2),
        ([], "gpt", "convex-constant", 19),
    ],
)
def test_sets_of_tasks(
    option: list[str], first: str, last: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(tuning, "measure", lambda *arguments: asked.append(arguments) or {})
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "tuning", "--results", str(tmp_path / "none"), *option])
    benchmark.main()
    ((_, names, chosen, *_),) = asked
    assert (names[0], names[-1], len(names)) == (first, last, count)
    assert {methods.SWEEP, methods.FIXED, methods.TUNER} <= set(chosen)
    assert ("mechanic-pytorch" in chosen) == (count in (2, 19) and "g3" not in names)


def test_the_ladder_shows_how_learning_rates_go_with_the_horizon(tmp_path: Path) -> None:
    found: results.Results = {}
    for task in ladder.TASKS.values():
        best = -2.0 if task.steps > 1000 else 0.0
        found |= grid_by(_ends_at(best), task)
        steps = range(task.steps // 10, task.steps + 1, task.steps // 10)
        own = [(step, 0.02 if step <= task.steps // 5 else 0.01) for step in steps]
        found[results.Run(task.name, methods.TUNER, 1.0, 0)] = results.Result(2.2, 5.5, own, 1.0)
    names = list(ladder.TASKS)
    assert ladder_report.scales(found, ladder.TASKS["ladder-gpt-cosine-1000"], [0]) == pytest.approx((0.02, 0.01))
    assert ladder_report.scales(found, ladder.TASKS["ladder-gpt-wsd-1000"], [0]) == pytest.approx((0.01, 0.01))
    rows = tuning_report.rows(found, names, methods.LADDER_METHODS, [0])
    table = ladder_report.table(found, rows, [0])
    assert "| gpt, cosine | 3,000 | 0.000977 | 0.02 | 0.01 | 20.48 | +9.4% | +0.0% |" in table
    assert ladder_report.exponent([300, 3000, 30000], [0.01, 0.001, 0.0001]) == pytest.approx(-1.0)
    image = tmp_path / "ladder.png"
    ladder_report.plot(found, rows, [0], image)
    assert image.stat().st_size > 1000


PEERS = {"Prodigy": "prodigyopt", "D-Adaptation": "dadaptation", "Schedule-Free": "schedulefree"}


@pytest.mark.parametrize("with_peers", [False, True])
def test_every_method_trains_and_a_stopped_benchmark_continues(
    with_peers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in PEERS.values() if with_peers else ():
        pytest.importorskip(package)
    used = [method for method in methods.METHODS if with_peers or method not in PEERS]
    short = dataclasses.replace(tasks.TASKS["gpt"], steps=3)
    monkeypatch.setitem(tasks.TASKS, "gpt", short)
    monkeypatch.setattr(data, "HELD_OUT", 4)
    file, image = tmp_path / "deep" / "results.jsonl", tmp_path / "plot.png"
    command = ["benchmark.py", "tuning", "--tasks", "gpt", "--seeds", "1", "--processes", "1"]
    command += ["--results", str(file), "--methods", *used, methods.FIXED]
    monkeypatch.setattr(sys, "argv", [*command, "--plot", str(image)])
    benchmark.main()
    whole = file.read_text().splitlines()
    assert {json.loads(line)["method"] for line in whole} == set(used)
    losses = [json.loads(line)["loss"] for line in whole if json.loads(line)["method"] != methods.SWEEP]
    assert all(4.5 < loss < 6.0 for loss in losses)  # 256 equally likely bytes have 5.55
    assert all(5.4 < json.loads(line)["start"] < 5.8 for line in whole)
    assert image.stat().st_size > 1000

    ran: list[results.Run] = []
    execute = tuning.execute
    monkeypatch.setattr(tuning, "execute", lambda run: ran.append(run) or execute(run))
    file.write_text("\n".join(whole[:-1]) + "\n" + whole[-1][:20])
    benchmark.main()
    assert [run.method for run in ran] == [json.loads(whole[-1])["method"]]
    again = results.read(file)
    assert [json.loads(line)["loss"] for line in whole] == [result.loss for result in again.values()]
    assert "| multiplicative | 1 |" in capsys.readouterr().out


def test_a_benchmark_of_generated_tasks_has_fixed_learning_rates_and_a_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = generated.generated(2)  # a linear regression, which needs no package
    monkeypatch.setattr(
        results, "generated", lambda seed: dataclasses.replace(short, name=f"g{seed}", guess=1.0, steps=3 + 20 * seed)
    )
    file, images = tmp_path / "results.jsonl", [tmp_path / "profile.png", tmp_path / "sweeps.png"]
    command = ["benchmark.py", "tuning", "--generated-seeds", "0", "2", "--seeds", "1", "--processes", "1"]
    command += ["--results", str(file), "--methods", methods.SWEEP, methods.FIXED, methods.TUNER, "--base-lrs", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--profile", str(images[0]), "--sweeps", str(images[1])])
    benchmark.main()
    table = capsys.readouterr().out
    assert "2 of 2 tasks" in table
    assert "| fixed lr | 2 |" in table
    assert all(image.stat().st_size > 1000 for image in images)
    before = file.read_text()
    monkeypatch.setattr(sys, "argv", [*command, "--no-runs"])
    benchmark.main()
    assert file.read_text() == before
    assert table.splitlines()[-6:] == capsys.readouterr().out.splitlines()[-6:]
