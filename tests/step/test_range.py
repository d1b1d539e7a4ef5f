"""For inputs of any magnitude, sums, scale and parameters are finite and equal to those of float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manic import Mechanic
from manic.step.kernels import inner_products
from manic.tuners.mechanic_reference import EPS, MechanicReference

FLOAT32_ACCURACY = 2e-6
S_DECAY = 0.01
# The tuner adds EPS to |h|: values below its rounding count as zero.
NEGLIGIBLE = 1e-16 * EPS


def drifting(size: int, steps: int, magnitude: float, dtype: torch.dtype) -> list[Tensor]:
    """Gradients with a common mean, so that sums do not cancel."""
    generator = torch.Generator().manual_seed(1)
    drift = torch.randn(size, generator=generator, dtype=torch.float64)
    noise = torch.randn(steps, size, generator=generator, dtype=torch.float64)
    return [gradient.to(dtype) for gradient in magnitude * (drift + 0.3 * noise)]


def wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64, copy=True)


def check_steps(start: Tensor, gradients: list[Tensor], lr: float, s_init: float = 1e-6) -> Mechanic:
    """Compare every step with float64 arithmetic on the optimizer's state before it."""
    x = start.clone().requires_grad_()
    optimizer = Mechanic(torch.optim.SGD([x], lr=lr), s_init=s_init, s_decay=S_DECAY, variant="optax")
    reference = MechanicReference([], optimizer, "optax", s_init, S_DECAY)
    for gradient in gradients:
        state = optimizer.state.get(x, {})
        delta = wide(state["mechanic_delta"]) if state else torch.zeros_like(start, dtype=torch.float64)
        position, g, scale = wide(x.detach()), wide(gradient), reference.scale
        x.grad = gradient.clone()
        optimizer.step()

        metrics = {name: value.item() for name, value in optimizer.metrics().items()}
        pull = S_DECAY * scale * g.norm() / (position.norm() + EPS)
        terms = torch.stack([delta * g, pull * delta * position])
        h, rounding = terms.sum().item(), FLOAT32_ACCURACY * terms.abs().sum().item() + NEGLIGIBLE
        reference.learn(h)
        assert metrics["grad_norm"] == pytest.approx(g.norm().item(), rel=FLOAT32_ACCURACY, abs=0.0)
        assert metrics["param_norm"] == pytest.approx(position.norm().item(), rel=FLOAT32_ACCURACY, abs=0.0)
        assert metrics["h"] == pytest.approx(h, rel=0.0, abs=rounding)
        assert metrics["scale"] == pytest.approx(reference.scale, rel=10 * FLOAT32_ACCURACY, abs=0.0)
        state = optimizer.state[x]
        right = state["mechanic_x_ref"].double() + reference.scale * state["mechanic_delta"].double()
        finfo = torch.finfo(start.dtype)
        assert right.abs().max() < finfo.max, "overflow in the dtype: the comparison is void"
        size = state["mechanic_x_ref"].double().abs() + (reference.scale * state["mechanic_delta"].double()).abs()
        rounding_of_x = (finfo.eps + 10 * FLOAT32_ACCURACY) * size + finfo.tiny
        assert ((x.detach().double() - right).abs() <= rounding_of_x).all()
    return optimizer


def weights(size: int, dtype: torch.dtype, magnitude: float = 1.0) -> Tensor:
    return magnitude * torch.randn(size, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-18, 1e-15, 1e-6, 1.0, 1e6, 1e15, 1e18, 1e30])
def test_gradients_of_any_size(magnitude: float, dtype: torch.dtype) -> None:
    check_steps(weights(3000, dtype), drifting(3000, 6, magnitude, dtype), lr=1.0)


@pytest.mark.parametrize("magnitude", [1e-7, 1e-3, 1.0, 1e4])
def test_float16_gradients_of_any_size(magnitude: float) -> None:
    check_steps(weights(3000, torch.float16), drifting(3000, 6, magnitude, torch.float16), lr=1.0)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-15, 1e15, 1e30])
def test_parameters_of_any_size(magnitude: float) -> None:
    check_steps(weights(3000, torch.float32, magnitude), drifting(3000, 6, 1.0, torch.float32), lr=1.0)


@pytest.mark.parametrize("s_init", [1e-30, 1e-6, 1.0, 1e10])
@pytest.mark.parametrize("lr", [1e-12, 1e-6, 1.0, 1e6])
def test_learning_rates_and_scales_of_any_size(lr: float, s_init: float) -> None:
    check_steps(weights(3000, torch.float32), drifting(3000, 6, 1.0, torch.float32), lr, s_init)


@pytest.mark.parametrize(("lr", "magnitude"), [
    (1e-12, 1e-30), (1e-12, 1e-15), (1e-12, 1e15), (1e-12, 1e30),
    (1e6, 1e-30), (1e6, 1e-15), (1e6, 1e12), (1e6, 1e15), (1e6, 1e30),
])  # fmt: skip
def test_learning_rate_and_gradients_of_any_size(lr: float, magnitude: float) -> None:
    check_steps(weights(3000, torch.float32), drifting(3000, 6, magnitude, torch.float32), lr)


@given(
    size=st.integers(1, 200),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    of_gradient=st.floats(-15, 15),
    of_x=st.floats(-15, 15),
    lr=st.floats(-12, 6),
    s_init=st.floats(-30, 0),
)
@settings(deadline=None, max_examples=40)
def test_any_combination(
    size: int, dtype: torch.dtype, of_gradient: float, of_x: float, lr: float, s_init: float
) -> None:
    """Powers of ten for which sums of 200 products of gradients, Delta and x do not overflow float32."""
    of_gradient = min(of_gradient, (34 - lr) / 2, 15 - lr - s_init)
    gradients = drifting(size, 4, 10**of_gradient, dtype)
    check_steps(weights(size, dtype, 10**of_x), gradients, 10**lr, 10**s_init)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["optax", "pytorch"])
@pytest.mark.parametrize(("of_x", "of_gradient"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_zeros(of_x: float, of_gradient: float, variant: str, dtype: torch.dtype) -> None:
    start = weights(50, dtype, of_x)
    x = start.clone().requires_grad_()
    optimizer = Mechanic(torch.optim.SGD([x], lr=1.0), variant=variant, s_init=1e-3)
    for _ in range(5):
        x.grad = torch.full_like(x, of_gradient)
        optimizer.step()
        metrics = {name: value.item() for name, value in optimizer.metrics().items()}
        assert x.isfinite().all()
    if of_gradient:
        assert metrics["scale"] > 0
        assert (x < 0).all()
        assert all(math.isfinite(value) for value in metrics.values()), metrics
        assert metrics["grad_norm"] == pytest.approx(of_gradient * 50**0.5)
    else:  # the run has not begun
        assert torch.equal(x.detach(), start)
        assert math.isnan(metrics["h"])


def relative_errors(count: int, dtype: torch.dtype) -> list[float]:
    """Relative errors of the four sums over ``count`` elements: eight pieces of full size, repeated."""
    generator = torch.Generator().manual_seed(5)
    size = 1 << 20
    pairs = [("delta", "grad"), ("grad", "grad"), ("delta", "x"), ("x", "x")]
    shared = [torch.randn(size, generator=generator) for _ in range(8)]
    total, exact = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    rounds = count // (8 * size)
    for part in shared:
        gradient = (part + 0.5 * torch.randn(size, generator=generator)).to(dtype)
        delta, x = 100.0 * part, (0.02 * part + 0.02 * torch.randn(size, generator=generator)).to(dtype)
        for _ in range(rounds):
            total += torch.stack(inner_products(pairs, {"delta": delta, "grad": gradient, "x": x})).double()
        d, g, p = delta.double(), gradient.double(), x.double()
        exact += rounds * torch.stack([d @ g, g @ g, d @ p, p @ p])
    return ((total - exact).abs() / exact).tolist()


# Sums within a piece are float32, sums of pieces float64: the error is that of one piece, for any number of pieces.
# Squares of bfloat16 numbers have few digits, so their rounding is biased.
@pytest.mark.parametrize(("dtype", "of_products", "of_squares"), [
    (torch.float32, 2e-6, 2e-5), (torch.bfloat16, 2e-6, 1e-4),
])  # fmt: skip
@pytest.mark.parametrize("count", [pytest.param(10**10, marks=pytest.mark.slow), 10**8])
def test_sums_of_many_elements(count: int, dtype: torch.dtype, of_products: float, of_squares: float) -> None:
    delta_grad, grad_square, delta_dot, x_square = relative_errors(count, dtype)
    assert max(delta_grad, delta_dot) < of_products
    assert max(grad_square, x_square) < of_squares
