"""Settings of groups and gradients that torch's optimizers take: no learning rate, gradients of another dtype."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from manic import Mechanic
from manic.tuners.registry import TUNERS
from support.problems import problem


class RelativeStep(Optimizer):
    """As Adafactor with relative_step=True: it makes its own learning rate, and has lr=None, or none, in its groups."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                count = self.state[p].setdefault("count", torch.zeros(()))
                count += 1
                p.add_(p.grad.sign(), alpha=-(float(count) ** -0.5))


@pytest.mark.parametrize("defaults", [{"lr": None}, {}], ids=str)
@pytest.mark.parametrize("options", [{}, {"nonfinite": "ignore"}], ids=str)
@pytest.mark.parametrize("variant", TUNERS)
def test_a_base_without_a_learning_rate(variant: str, options: dict[str, Any], defaults: dict[str, Any]) -> None:
    def train(settings: dict[str, Any]) -> tuple[Mechanic, list[Tensor]]:
        parameters, loss = problem()
        optimizer = Mechanic(RelativeStep(parameters, settings), variant=variant, **options)
        for step in range(20):
            optimizer.zero_grad()
            loss(step).backward()
            optimizer.step()
        return optimizer, parameters

    optimizer, parameters = train(defaults)
    expected, others = train({"lr": 1.0})
    assert optimizer.scale == expected.scale > 0
    assert all(torch.equal(a, b) for a, b in zip(parameters, others))
    assert optimizer.metrics()["effective_lr/0"] == optimizer.scale
    metrics = optimizer.metrics(to_host=True)
    assert all(map(math.isfinite, metrics.values())), metrics


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no gradients of another dtype")
@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.01}, {"momentum": 0.9, "weight_decay": 0.01}], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"store_delta": True}, {"update": "snapshot"}, {"nonfinite": "ignore"}], ids=str
)
@pytest.mark.parametrize("variant", TUNERS)
def test_gradients_of_another_dtype(variant: str, options: dict[str, Any], settings: dict[str, Any]) -> None:
    """float32 parameters with bfloat16 gradients equal those with the same gradients in float32."""

    def train(dtype: torch.dtype) -> tuple[float, Tensor, Tensor]:
        p = torch.nn.Parameter(torch.linspace(-1, 1, 30))
        p.grad_dtype = dtype
        base = torch.optim.SGD([p], lr=0.1, foreach=False, **settings)
        optimizer = Mechanic(base, variant=variant, **options)
        for step in range(10):
            p.grad = (p.detach() - 0.5 + 0.1 * step).bfloat16().to(dtype)
            gradient = p.grad
            optimizer.step()
            assert p.grad is gradient
            assert p.grad_dtype == dtype
        return optimizer.scale.item(), p.detach(), gradient

    scale, x, _ = train(torch.bfloat16)
    expected, other, _ = train(torch.float32)
    assert scale == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(x, other, rtol=1e-4, atol=1e-5)
