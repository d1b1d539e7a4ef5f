"""The tuner alone: four numbers in, S out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manic.tuners.base import VARIANTS, S, Sums
from manic.tuners.multiplicative import Multiplying
from manic.tuners.registry import make_tuner
from support.oracle import BETAS, Multiplier, Oracle

BETTING = [name for name, variant in VARIANTS.items() if not variant.multiplies]


def sums(
    delta_grad: float, grad_square: float = 1.0, delta_dot: float = 0.0, x_square: float = 1.0, lr: float = 1.0
) -> Sums:
    numbers = (delta_grad, grad_square, delta_dot, x_square, lr)
    return Sums(*(torch.tensor(number, dtype=torch.float64) for number in numbers))


def multiplying(**settings: Any) -> Multiplying:
    tuner = make_tuner("multiplicative", **settings)
    assert isinstance(tuner, Multiplying)
    return tuner


@pytest.mark.parametrize("variant", BETTING)
@given(hs=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), s_init=st.floats(1e-10, 1e2))
def test_equals_the_oracle_on_any_rewards(variant: str, hs: list[float], s_init: float) -> None:
    tuner = make_tuner(variant, betas=BETAS, s_init=s_init)
    oracle = Oracle([], None, variant, s_init)  # type: ignore[arg-type]
    for h in hs:
        scale = tuner.update(sums(h))
        oracle._tune(h)
        assert scale.item() == pytest.approx(oracle.scale, rel=1e-9, abs=1e-300)
    assert tuner.updates.item() == len(hs)


@given(
    steps=st.lists(
        st.tuples(st.floats(-2.0, 2.0), st.floats(0.0, 1e6), st.floats(0.0, 1e6), st.floats(0.0, 1.0)),
        min_size=1,
        max_size=40,
    ),
    beta=st.floats(0.5, 0.9999),
)
def test_the_one_that_multiplies_equals_its_oracle(steps: list[tuple[float, ...]], beta: float) -> None:
    tuner = multiplying(betas=(beta,))
    oracle = Multiplier([], None, 1e-4, beta)  # type: ignore[arg-type]
    oracle.scale = tuner.start(torch.tensor(4.0, dtype=torch.float64), torch.tensor(9.0, dtype=torch.float64)).item()
    assert oracle.scale == pytest.approx(1e-4 * 3.0 / 2.0)
    for cosine, way, gradient, lr in steps:
        way_grad = cosine * way * gradient
        scale = tuner.update(sums(way_grad, gradient**2, way**2, 1.0, lr))
        oracle._tune(way_grad, gradient**2, way**2, lr)
        assert scale.item() == pytest.approx(oracle.scale, rel=1e-9)


@pytest.mark.parametrize("x_square", [0.0, 4.0])
def test_the_first_step_has_the_length_that_is_asked_for(x_square: float) -> None:
    tuner = multiplying(s_init=1e-3)
    nothing, x = torch.zeros((), dtype=torch.float64), torch.tensor(x_square, dtype=torch.float64)
    assert tuner.start(nothing, x) == 0.0
    assert not tuner.has_gained()
    for size in (1e-8, 1.0, 1e8):
        scale = tuner.start(torch.tensor(size**2, dtype=torch.float64), x)
        assert (scale * size).item() == pytest.approx(1e-3 * (x_square**0.5 or 1.0))
    assert multiplying(s_init=1e-3, s_max=1e-9).start(x + 1.0, x + 1.0) == 1e-9


@pytest.mark.parametrize("variant", BETTING)
def test_the_lambda_term_pulls_by_global_norms(variant: str) -> None:
    tuner = make_tuner(variant, betas=BETAS, s_init=0.5, s_decay=0.1)
    tuner.update(sums(-1.0))
    s = tuner.state[S].sum().item()
    tuner.update(sums(2.0, grad_square=9.0, delta_dot=5.0, x_square=4.0))
    assert tuner.h.item() == pytest.approx(2.0 + 0.1 * s * 3.0 / (2.0 + 1e-8) * 5.0)


def test_moving_against_the_gradient_grows_the_scale() -> None:
    for variant in BETTING:
        tuner = make_tuner(variant, betas=BETAS)
        scales = [tuner.update(sums(-1.0)).item() for _ in range(50)]
        assert scales[-1] > 1e3 * scales[2]


def test_keeps_float64_and_steps_in_place() -> None:
    tuner = make_tuner("optax", betas=BETAS)
    state = tuner.state
    tuner.update(sums(-1.0))
    assert tuner.state is state
    assert state.dtype == torch.float64
    assert state.shape == (8, len(BETAS))


def test_all_zero_sums_are_harmless() -> None:
    for variant in VARIANTS:
        tuner = make_tuner(variant, betas=BETAS)
        for _ in range(5):
            assert math.isfinite(tuner.update(sums(0.0, 0.0, 0.0, 0.0)).item())


def test_load_refuses_another_number_of_betas() -> None:
    with pytest.raises(ValueError, match="other betas"):
        make_tuner("optax", betas=(0.9, 0.99)).load(make_tuner("optax", betas=BETAS).state)
