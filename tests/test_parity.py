"""The variants "optax" and "pytorch" equal the two published implementations in every step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from manic import Mechanic
from support.golden.problems import BASES, PROBLEMS, STEPS, data, learning_rate, start
from support.golden.torch_losses import loss

OPTAX = json.loads((Path(__file__).parent / "support" / "golden" / "optax.json").read_text())


def base_class(base: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    if base == "sgd":
        return torch.optim.SGD, {"lr": 1.0}
    if base == "momentum":
        return torch.optim.SGD, {"lr": 1.0, "momentum": 0.9}
    return torch.optim.AdamW, {"lr": 1.0, "weight_decay": 0.1}


def trajectory(
    problem: str, base: str, wrap: Any, read_scale: Any, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Train for STEPS steps; return S and |x| after each, and the parameters at the end."""
    x, y = (torch.tensor(array, dtype=dtype) for array in data())
    parameters = {name: torch.tensor(array, dtype=dtype, requires_grad=True) for name, array in start(problem).items()}
    optimizer = wrap(*base_class(base), list(parameters.values()))
    scales, norms = [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(base, step)
        optimizer.zero_grad()
        loss(problem, parameters, x, y).backward()
        optimizer.step()
        scales.append(float(read_scale(optimizer)))
        norms.append(float(torch.cat([p.detach().ravel() for p in parameters.values()]).norm()))
    return {"scale": scales, "param_norm": norms, "final": {k: p.detach().ravel() for k, p in parameters.items()}}


def ours(**options: Any) -> Any:
    return lambda cls, settings, parameters: Mechanic(cls(parameters, **settings), **options)


def scale_of(optimizer: Any) -> float:
    return optimizer.scale.item()


def assert_same(mine: dict[str, Any], theirs: dict[str, Any], rtol: float) -> None:
    for name in ("scale", "param_norm"):
        actual, expected = (torch.tensor(run[name], dtype=torch.float64) for run in (mine, theirs))
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=0.0)
    for name, value in theirs["final"].items():
        expected = torch.as_tensor(value, dtype=mine["final"][name].dtype)
        torch.testing.assert_close(mine["final"][name], expected, rtol=10 * rtol, atol=10 * rtol)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_optax_variant_equals_optax(problem: str, base: str) -> None:
    mine = trajectory(problem, base, ours(variant="optax", store_delta=False), scale_of)
    assert_same(mine, OPTAX[f"{problem}/{base}"], rtol=1e-10)


@pytest.mark.parametrize("store_delta", [False, True])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 2e-2)])
def test_pytorch_variant_equals_mechanic_pytorch(
    problem: str, base: str, store_delta: bool, dtype: torch.dtype, rtol: float
) -> None:
    peer = pytest.importorskip("mechanic_pytorch")

    def theirs(cls: Any, settings: Any, parameters: Any) -> Any:
        return peer.mechanize(cls, store_delta=store_delta)(parameters, **settings)

    def their_scale(optimizer: Any) -> float:
        return optimizer.state["_mechanic"]["s"].sum().clamp(min=0.0).item()

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # the package stores its tuner in the default dtype
    try:
        expected = trajectory(problem, base, theirs, their_scale, dtype)
    finally:
        torch.set_default_dtype(before)
    mine = trajectory(problem, base, ours(variant="pytorch", store_delta=store_delta), scale_of, dtype)
    assert_same(mine, expected, rtol=rtol)
