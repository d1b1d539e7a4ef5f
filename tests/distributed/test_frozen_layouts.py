"""Parameters that are frozen and trained again find a single process's scale in every layout."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from manic.testing import run
from support.layouts import setup
from support.snapshots import take_steps

LAYOUTS = [("fsdp2", 2), ("fsdp2", 4), ("tp+fsdp2", 4), ("hsdp", 4), ("zero1", 2), ("fsdp1-flat", 2), ("ddp", 2)]
# Where single layers can be frozen in the middle of a run.
BY_LAYER = [("fsdp2", 2), ("fsdp2", 4), ("tp+fsdp2", 4), ("hsdp", 4)]


def train(layout: str, base: str, how: str, variant: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Five steps, five with a frozen part, five with all, then one in two."""
    prepared = setup(layout, base, torch.float64, variant=variant, s_init=1e-2 if variant == "multiplicative" else 1e-3)
    for step in range(20):
        frozen = 5 <= step < 10 or (step >= 15 and step % 2 == 0)
        if how == "lr":
            for group in prepared.optimizer.param_groups:
                group["lr"] = 0.0 if frozen else 1.0
        else:
            for name, parameter in prepared.model.named_parameters():
                if "down" in name:
                    parameter.requires_grad_(not frozen)
        take_steps(prepared, step, 1)
    prepared.mechanic.check_consistency()
    return prepared.mechanic.scale.item(), prepared.gather()


@functools.cache
def single(*arguments: str) -> Any:
    return train("single", *arguments)


@pytest.mark.parametrize(("layout", "world_size", "how", "variant"), [
    *((*each, "lr", "multiplicative") for each in LAYOUTS),
    *((*each, "requires_grad", "optax") for each in BY_LAYER),
    *(pytest.param(*each, "lr", "optax", marks=pytest.mark.slow) for each in LAYOUTS),
    *(pytest.param(*each, "requires_grad", "multiplicative", marks=pytest.mark.slow) for each in BY_LAYER),
])  # fmt: skip
def test_freezing_equals_a_single_process(layout: str, world_size: int, how: str, variant: str) -> None:
    expected_scale, expected = single("adamw", how, variant)
    for scale, parameters in run(train, world_size, layout, "adamw", how, variant):
        assert scale == pytest.approx(expected_scale, rel=1e-11)
        for name, value in expected.items():
            torch.testing.assert_close(parameters[name], value, rtol=1e-10, atol=1e-10)
