"""Training in every layout equals training on a single process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from manic.testing import run
from manic.tuners.registry import TUNERS
from support.layouts import Trained, make_net, train

STEPS = 20
S_INIT = 1e-3
SOME = [("ddp", 3), ("fsdp2", 3), ("hsdp", 4), ("tp", 2), ("fsdp1-orig", 2), ("zero1", 2), ("pipeline", 2)]
# The variants that are tried in every layout, one for each rule; others are among the options below.
EVERYWHERE: dict[str, dict[str, Any]] = {
    "optax": {"rtol": 1e-12}, "multiplicative": {"rtol": 1e-11, "variant": "multiplicative", "s_init": 1e-2},
}  # fmt: skip
LAYOUTS = [
    ("single", 1),
    ("ddp", 2), ("ddp", 3),
    ("fsdp2", 1), ("fsdp2", 2), ("fsdp2", 3), ("fsdp2", 4),
    ("hsdp", 2), ("hsdp", 4),
    ("tp", 2), ("tp", 4),
    ("tp+fsdp2", 4),
    ("mixed", 2), ("mixed", 4),
    ("fsdp1-orig", 2), ("fsdp1-orig", 3), ("fsdp1-flat", 2), ("fsdp1-flat", 4), ("fsdp1-hybrid", 4),
    ("zero1", 2), ("zero1", 4),
    ("pipeline", 2), ("pipeline", 4),
]  # fmt: skip


@functools.cache
def single(base: str, dtype: torch.dtype, options: tuple[tuple[str, Any], ...]) -> Trained:
    return train("single", base, STEPS, dtype, dict(options))


def assert_equals_a_single_process(
    layout: str, world_size: int, base: str, dtype: torch.dtype, rtol: float, **options: Any
) -> None:
    options = {"s_init": S_INIT, **options}
    expected = single(base, dtype, tuple(options.items()))
    start = dict(make_net(dtype).named_parameters())
    moved = max(float((value - start[name]).detach().abs().max()) for name, value in expected.parameters.items())
    assert moved > 0.05, "the displacement is too small for a comparison"
    for trained in run(train, world_size, layout, base, STEPS, dtype, options):
        assert trained.scale == pytest.approx(expected.scale, rel=rtol)
        for name in ("grad_norm", "param_norm"):
            assert trained.metrics[name] == pytest.approx(expected.metrics[name], rel=10 * rtol), name
        for name, value in expected.parameters.items():
            torch.testing.assert_close(trained.parameters[name], value, rtol=10 * rtol, atol=10 * rtol)


@pytest.mark.parametrize("variant", EVERYWHERE)
@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS)
def test_float64(layout: str, world_size: int, variant: str) -> None:
    assert_equals_a_single_process(layout, world_size, "adamw", torch.float64, **EVERYWHERE[variant])


@pytest.mark.parametrize(
    ("layout", "world_size"), [pytest.param(*each, marks=() if each in SOME else pytest.mark.slow) for each in LAYOUTS]
)
def test_another_base(layout: str, world_size: int) -> None:
    assert_equals_a_single_process(layout, world_size, "sgd", torch.float64, rtol=1e-12)


@pytest.mark.parametrize(("layout", "world_size"), [("ddp", 3), ("fsdp2", 4), ("tp+fsdp2", 4), ("fsdp1-flat", 4)])
def test_float32(layout: str, world_size: int) -> None:
    assert_equals_a_single_process(layout, world_size, "sgd", torch.float32, rtol=1e-4)


@pytest.mark.parametrize("options", [
    {"store_delta": False}, {"variant": "pytorch", "store_delta": False},
    *({"variant": variant} for variant in TUNERS if variant not in EVERYWHERE),
    {"update": "snapshot"}, {"variant": "multiplicative", "store_delta": False},
], ids=str)  # fmt: skip
@pytest.mark.parametrize(("layout", "world_size"), [("fsdp2", 4), ("tp+fsdp2", 4), ("zero1", 2), ("fsdp1-hybrid", 4)])
def test_options(layout: str, world_size: int, options: dict[str, Any]) -> None:
    assert_equals_a_single_process(layout, world_size, "sgd", torch.float64, rtol=1e-10, **options)


@pytest.mark.parametrize(("layout", "world_size"), [("fsdp2", 3), ("tp+fsdp2", 4)])
def test_a_base_that_reads_its_parameters(layout: str, world_size: int) -> None:
    assert_equals_a_single_process(layout, world_size, "asgd", torch.float64, rtol=1e-12)
