"""DeepSpeed's ZeRO with the real package: the scale of one process, or an error on all ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from manic import Mechanic, mechanize
from manic.integrations.deepspeed import whole_model_steps
from manic.testing import run
from support.deepspeed_runs import (
    STEPS,
    Run,
    begin,
    engine_of,
    in_one_process,
    make,
    take_step,
    weights_of,
    with_deepspeed,
)
from support.pages import run_page

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


pytestmark = pytest.mark.usefixtures("processes_of_its_own")


VARIANTS = ("multiplicative", "optax")
ONE_GROUP = [Run(stage, variant=variant) for stage in range(4) for variant in VARIANTS]
SEVERAL_GROUPS = [Run(stage, groups=2, variant=variant) for stage in range(4) for variant in VARIANTS]
SUB_GROUPS = [Run(3, groups=groups, variant=variant, sub_group_size=1) for groups in (1, 2) for variant in VARIANTS]
LOW = [Run(stage, groups=groups, dtype=torch.bfloat16) for stage in range(4) for groups in (1, 2)]


def equal(runs: list[Run], scale: float, weights: float) -> None:
    """Train each run with DeepSpeed, and compare it with one process: the largest relative differences allowed."""
    for each in runs:
        found, expected = with_deepspeed(each), in_one_process(each)
        assert found.scales == pytest.approx(expected.scales, rel=scale), each
        moved = (expected.weights - start_of(each)).norm()
        assert (found.weights - expected.weights).norm() < weights * moved, each
        if each.stage:
            assert found.norms == pytest.approx(expected.norms, rel=10 * scale), each


def start_of(each: Run) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in make(each).parameters()])


@pytest.mark.framework("DeepSpeed", "ZeRO-0 to 3, one param group, 1 to 3 ranks: the scale of one process")
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_one_group(world_size: int) -> None:
    run(equal, world_size, ONE_GROUP, 1e-5, 1e-4)


@pytest.mark.framework("DeepSpeed", "ZeRO-0 to 3, several param groups, 1 to 2 ranks: one scale by `whole_model_steps`")
@pytest.mark.parametrize("world_size", [1, 2])
def test_several_groups(world_size: int) -> None:
    run(equal, world_size, SEVERAL_GROUPS, 1e-5, 1e-4)


@pytest.mark.framework("DeepSpeed", "ZeRO-3, several sub-groups, 3 ranks: one scale by `whole_model_steps`")
def test_sub_groups() -> None:
    run(equal, 3, SUB_GROUPS, 1e-5, 1e-4)


@pytest.mark.framework("DeepSpeed", "ZeRO-0 to 3 in bfloat16, gradients accumulated in float32")
def test_bfloat16() -> None:
    run(equal, 2, LOW, 1e-3, 0.05)


@pytest.mark.framework("DeepSpeed", "ZeRO-1 to 3 with the optimizer offloaded to the CPU")
def test_offload() -> None:
    run(equal, 2, [Run(stage, groups=groups, offloads=True) for stage in (1, 2, 3) for groups in (1, 2)], 1e-5, 1e-4)


@pytest.mark.slow  # DeepSpeed compiles it first
def test_cpu_adam() -> None:
    runs = [Run(stage, groups=2, offloads=True, compiles=True) for stage in (1, 2, 3)]
    run(equal, 2, runs, 1e-4, 1e-3, timeout=280)


@pytest.mark.framework("DeepSpeed", "ZeRO-3 with a model that is built in `deepspeed.zero.Init`")
def test_partitioned_at_first() -> None:
    run(equal, 2, [Run(3, groups=groups, begins_partitioned=True) for groups in (1, 2)], 1e-5, 1e-4)


@pytest.mark.framework("DeepSpeed", '`scale="per group"` and other options of Mechanic')
def test_options() -> None:
    options: list[dict[str, Any]] = [
        {"scale": "per group"}, {"nonfinite": "ignore"}, {"store_delta": True, "check_every": 3},
    ]  # fmt: skip
    runs = [Run(stage, groups=2, options=tuple(each.items())) for each in options for stage in (1, 3)]
    run(equal, 2, runs, 1e-5, 1e-4)


@pytest.mark.framework("DeepSpeed", "`gradient_clipping`, and micro batches")
def test_clipping_and_accumulation() -> None:
    runs = [Run(stage, groups=2, clipping=0.05, accumulates=3) for stage in range(4)]
    run(equal, 2, runs, 1e-5, 1e-4)


@pytest.mark.framework("DeepSpeed", 'ZeRO-0: `plain="sharded"` and `"replicated"` have the same scale')
def test_plain_of_stage_0() -> None:
    run(equal, 2, [Run(0, plain="replicated", variant=variant) for variant in VARIANTS], 1e-5, 1e-4)


def leaves_out(runs: list[Run]) -> None:
    for each in runs:
        (engine, optimizer), (other, reference) = engine_of(each), engine_of(each)
        for step in range(8):
            if step == 4:
                scale, before = optimizer.scale, weights_of(engine)
                take_step(engine, step, float("inf") if dist.get_rank() == 1 else 1.0)
                assert torch.equal(optimizer.scale, scale), each
                assert torch.equal(weights_of(engine), before), each
            take_step(engine, step)
            take_step(other, step)
        assert engine.skipped_steps == 1, each
        assert torch.equal(optimizer.scale, reference.scale), each
        assert torch.equal(weights_of(engine), weights_of(other)), each


@pytest.mark.framework("DeepSpeed", "a step that DeepSpeed skips for an overflow leaves S and the run as they were")
def test_skipped_steps() -> None:
    low = [Run(stage, groups=2, dtype=torch.bfloat16) for stage in (0, 1, 3)]
    run(leaves_out, 2, [*(Run(stage, groups=2) for stage in (1, 2, 3)), *low])


def overflows_at_first(runs: list[Run]) -> None:
    begin()
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().is_fp16_supported():
        pytest.skip("this CPU has no float16 operators")
    for each in runs:
        engine, optimizer = engine_of(each)
        while engine.skipped_steps == engine.global_steps:
            assert optimizer.scale.item() == 0.0, each
            take_step(engine, engine.global_steps)
        assert engine.skipped_steps > 0, each
        scales = [optimizer.scale.item()]
        while engine.global_steps < STEPS:
            take_step(engine, engine.global_steps)
            scales.append(optimizer.scale.item())
        assert scales == pytest.approx(in_one_process(each, first=engine.skipped_steps).scales, rel=1e-2), each


@pytest.mark.framework("DeepSpeed", "float16: steps that overflow before the first that is taken set no scale")
def test_float16() -> None:
    run(overflows_at_first, 2, [Run(stage, groups=2, dtype=torch.float16) for stage in (1, 2, 3)])


def raises(runs: list[Run]) -> None:
    for each in runs:
        engine, optimizer = engine_of(each)
        for step in range(4):
            take_step(engine, step)
        scale, before = optimizer.scale, weights_of(engine)
        with pytest.raises(RuntimeError, match=r"was not taken.*not finite"):
            take_step(engine, 4, float("inf") if dist.get_rank() == 1 else 1.0)
        assert torch.equal(optimizer.scale, scale), each
        assert torch.equal(weights_of(engine), before), each
        engine.optimizer.zero_grad()
        for step in range(4, 8):
            take_step(engine, step)
        assert optimizer.scale > scale, each


@pytest.mark.framework("DeepSpeed", "a gradient that is not finite, where DeepSpeed skips none: an error on all ranks")
def test_nonfinite_gradients() -> None:
    low = Run(2, groups=2, dtype=torch.bfloat16, checks_overflow=False)
    run(raises, 2, [Run(0), low])


def fails_in_the_middle(runs: list[Run]) -> None:
    for each in runs:
        (engine, optimizer), (other, reference) = engine_of(each), engine_of(each)
        for step in range(8):
            if step == 4:
                optimizer.optimizers[0].register_step_pre_hook(stop_once())
                with pytest.raises(KeyboardInterrupt):
                    take_step(engine, step)
                engine.optimizer.zero_grad()
            take_step(engine, step)
            take_step(other, step)
        assert torch.equal(optimizer.scale, reference.scale), each
        assert torch.equal(weights_of(engine), weights_of(other)), each


def stop_once() -> Callable[..., None]:
    """A hook that raises KeyboardInterrupt when it is called first."""
    calls = iter((KeyboardInterrupt(),))

    def hook(*_: Any) -> None:
        for error in calls:
            raise error

    return hook


@pytest.mark.framework("DeepSpeed", "an error in the middle of a step: the next one goes on from before it")
def test_errors_in_a_step() -> None:
    # A hook makes Mechanic take snapshots, in both engines.
    options = (("update", "snapshot"),)
    runs = [Run(stage, groups=2, options=options) for stage in (1, 2, 3)]
    run(fails_in_the_middle, 2, [*runs, Run(3, groups=2, sub_group_size=1, options=options)])


def begins_with_zero(runs: list[Run]) -> None:
    for each in runs:
        engine, optimizer = engine_of(each)
        before = weights_of(engine)
        assert optimizer.scale.item() == 0.0, each
        assert torch.equal(before, start_of(each)), each


@pytest.mark.framework("DeepSpeed", "the step with zero gradients in `deepspeed.initialize` sets no scale")
def test_zero_gradients_at_first() -> None:
    run(begins_with_zero, 2, [*LOW, Run(3, groups=2), Run(3, groups=2, sub_group_size=1)])


def shows_state(runs: list[Run]) -> None:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    for each in runs:
        engine, _ = engine_of(each)
        take_step(engine, 0)
        for parameter in engine.module.parameters():
            for found in (safe_get_full_fp32_param(parameter), safe_get_full_optimizer_state(parameter, "exp_avg")):
                assert found.shape == getattr(parameter, "ds_shape", parameter.shape), each
                assert found.any(), each


@pytest.mark.framework("DeepSpeed", "`safe_get_full_optimizer_state` and `safe_get_full_fp32_param`")
def test_access_to_the_state() -> None:
    run(shows_state, 2, [Run(stage, groups=groups) for stage in (1, 2, 3) for groups in (1, 2)])


def two_engines() -> None:
    (engine, optimizer), (other, _) = engine_of(Run(3)), engine_of(replace(Run(3), variant="optax"))
    for step in range(16):
        take_step(engine, step)
        take_step(other, step)
    assert optimizer.scale.item() == pytest.approx(in_one_process(Run(3)).scales[-1], rel=1e-3)


@pytest.mark.framework("DeepSpeed", "several engines in one job: each its own scale")
def test_two_engines() -> None:
    run(two_engines, 3)


def refuses(runs: list[Run], kind: type[Exception], words: str) -> None:
    for each in runs:
        engine, _ = engine_of(each)
        with pytest.raises(kind, match=words):
            take_step(engine, 0)


@pytest.mark.framework(
    "DeepSpeed", "several param groups or sub-groups without `whole_model_steps`", limit="refused on all ranks"
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_part_by_part_is_refused(variant: str) -> None:
    runs = [Run(stage, groups=2, variant=variant, joins=False) for stage in (1, 2, 3)]
    runs.append(Run(3, variant=variant, sub_group_size=1, joins=False))
    run(refuses, 2, runs, ValueError, r"cannot be stepped part by part.*whole_model_steps\(engine\)")


@pytest.mark.framework("DeepSpeed", 'ZeRO-1 to 3 without `plain="sharded"`', limit="refused on all ranks")
def test_replicated_is_refused() -> None:
    run(refuses, 2, [Run(stage, plain="replicated") for stage in (1, 2, 3)], ValueError, 'pass plain="sharded"')


def refuses_engines() -> None:
    begin()
    import deepspeed

    model = make(Run(1))
    base = torch.optim.AdamW(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=base, config=Run(1).config)
    with pytest.raises(TypeError, match=r"the engine has no Mechanic, but a DeepSpeedZeroOptimizer with a AdamW"):
        whole_model_steps(engine)
    engine, _ = engine_of(Run(3, groups=2, joins=False))
    engine.optimizer.swap_optimizer = True  # as with NVMe, whose operators are to be compiled
    with pytest.raises(TypeError, match="switch off ZenFlow, SuperOffload and NVMe"):
        whole_model_steps(engine)


@pytest.mark.framework("DeepSpeed", "NVMe, ZenFlow and SuperOffload", limit="refused by `whole_model_steps`")
def test_engines_that_are_refused() -> None:
    run(refuses_engines, 1)


def built_by_deepspeed() -> None:
    begin()
    import deepspeed

    each = Run(2)
    config = each.config
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3}}
    config["scheduler"] = {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 1.0, "warmup_num_steps": 10, "warmup_type": "linear"},
    }
    model = make(each)
    adamw = mechanize(torch.optim.AdamW, plain="sharded")
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), optimizer=adamw, config=config)
    whole_model_steps(engine)
    mechanic = engine.optimizer.optimizer
    assert isinstance(mechanic, Mechanic)
    for step in range(8):
        take_step(engine, step)
        assert mechanic.param_groups[0]["lr"] == pytest.approx(step / 10)
    assert mechanic.scale.item() > 0.0
    assert engine.get_lr() == [mechanic.param_groups[0]["lr"]]


@pytest.mark.framework("DeepSpeed", "a class as `optimizer=`, and the configuration's `scheduler`")
def test_built_by_deepspeed() -> None:
    run(built_by_deepspeed, 2)


def named_in_the_configuration() -> None:
    begin()
    import deepspeed

    model = make(Run(1))
    config = {**Run(1).config, "optimizer": {"type": "manic.AdamW", "params": {"lr": 1.0}}}
    with pytest.raises(AssertionError, match="is not a supported DeepSpeed Optimizer"):
        deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)


@pytest.mark.framework(
    "DeepSpeed", '`"optimizer": {"type": ...}` in the configuration', limit="names DeepSpeed's and torch's classes only"
)
def test_named_in_the_configuration() -> None:
    run(named_in_the_configuration, 1)


def runs_the_page(folder: Path) -> None:
    os.chdir(folder)
    begin()
    x = torch.randn(10, 8, 16, generator=torch.Generator().manual_seed(dist.get_rank()))
    loader = [(each, each[:, :5].sin()) for each in x]
    names = run_page("frameworks-deepspeed", {"model": make(Run(2)), "steps": 10, "loader": loader})
    assert names["optimizer"].scale.item() > 0.0
    assert (folder / "checkpoints" / "latest").read_text() == "global_step10"


@pytest.mark.framework("DeepSpeed", "the lines of its page")
def test_the_page(tmp_path: Path) -> None:
    run(runs_the_page, 2, tmp_path)
