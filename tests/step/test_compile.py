"""Compiled or plain, the numbers are the same; and the compiler may be wrapped around any part of a step."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from manic import Mechanic
from manic.step import kernels
from support.oracle import problem

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
COMPILED = {
    "sums and writes": lambda optimizer: None,
    "Mechanic.step": lambda optimizer: setattr(optimizer, "step", torch.compile(optimizer.step)),
    "the base's step": lambda optimizer: setattr(
        optimizer.optimizers[0], "step", torch.compile(optimizer.optimizers[0].step)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_kernels_do_the_same(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = kernels.working_dtype(torch.empty(0, dtype=dtype))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for shape in [(1,), (1000,), (4099,), (30, 7)]:
        x, x_ref, g = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
        delta = torch.randn(shape, generator=generator).to(wide)
        plain, compiled = kernels.plain(), kernels.compiled()
        torch.testing.assert_close(
            compiled.all_products(delta, g, x), plain.all_products(delta, g, x), rtol=tolerance, atol=tolerance
        )
        torch.testing.assert_close(
            compiled.products(delta, x), plain.products(delta, x), rtol=tolerance, atol=tolerance
        )
        for decay in (0.0, -0.25, torch.tensor(-0.25, dtype=wide)):
            if dtype != wide and decay != 0.0:  # decay is added to Delta where that has x's dtype
                continue
            results = []
            for write in (plain.write, compiled.write):
                x_out, delta_out = x.clone(), delta.clone()
                write(x_out, x_ref, delta_out, decay, torch.tensor(0.5, dtype=wide))
                results.append((x_out, delta_out))
            torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("what", COMPILED)
@pytest.mark.parametrize("options", [{}, {"store_delta": False}, {"update": "snapshot"}], ids=str)
def test_a_compiled_step_does_the_same(what: str, options: dict[str, Any]) -> None:
    def train(compile_it: Callable[[Mechanic], None], compile: bool) -> tuple[Tensor, list[Tensor]]:
        parameters, loss = problem()
        base = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.1)
        optimizer = Mechanic(base, s_init=1e-3, compile=compile, **options)
        compile_it(optimizer)
        for step in range(8):
            base.param_groups[0]["lr"] = 1.0 - 0.1 * step
            optimizer.zero_grad()
            loss(step).backward()
            optimizer.step()
        return optimizer.scale, [parameter.detach() for parameter in parameters]

    scale, parameters = train(lambda optimizer: None, compile=False)
    other_scale, other_parameters = train(COMPILED[what], compile=what == "sums and writes")
    # A compiled AdamW corrects its bias in float32; manic has no part in that.
    tolerance = 1e-5 if what == "the base's step" else 1e-9
    torch.testing.assert_close(other_scale, scale, rtol=tolerance, atol=0)
    torch.testing.assert_close(other_parameters, parameters, rtol=tolerance, atol=tolerance)
