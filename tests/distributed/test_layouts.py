"""Every layout trains like a single process."""

from __future__ import annotations

import functools

import pytest
import torch
from layouts import Trained, train

from manic.testing import run

STEPS = 12
LAYOUTS = [
    ("single", 1),
    ("ddp", 2), ("ddp", 3),
    ("fsdp2", 1), ("fsdp2", 2), ("fsdp2", 3), ("fsdp2", 4),
    ("hsdp", 4),
    ("tp", 2), ("tp", 4),
    ("tp+fsdp2", 4),
    ("mixed", 2), ("mixed", 4),
    ("fsdp1-orig", 2), ("fsdp1-orig", 3), ("fsdp1-flat", 2), ("fsdp1-flat", 4), ("fsdp1-hybrid", 4),
    ("zero1", 2), ("zero1", 4),
    ("pipeline", 2), ("pipeline", 4),
]  # fmt: skip


@functools.cache
def single(base: str, dtype: torch.dtype = torch.float64, **options: object) -> Trained:
    return train("single", base, STEPS, dtype, dict(options))


def assert_equal(trained: Trained, expected: Trained, rtol: float) -> None:
    assert trained.scale == pytest.approx(expected.scale, rel=rtol)
    for name in ("h", "grad_norm", "param_norm"):
        assert trained.metrics[name] == pytest.approx(expected.metrics[name], rel=rtol * 100), name
    for name, value in expected.parameters.items():
        torch.testing.assert_close(trained.parameters[name], value, rtol=rtol * 10, atol=rtol, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("base", ["adamw", "sgd"])
@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS)
def test_equals_a_single_process_in_float64(layout: str, world_size: int, base: str) -> None:
    for trained in run(train, world_size, layout, base, STEPS):
        assert_equal(trained, single(base), rtol=1e-12)
