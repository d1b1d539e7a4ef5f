"""Equals the reference for random shapes, placements, dtypes, learning rates and gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from manic import Mechanic
from manic.testing import run
from manic.tuners.mechanic_reference import MechanicReference


@dataclass(frozen=True)
class Case:
    """A model and its gradients."""

    world_size: int
    shapes: tuple[tuple[int, ...], ...]
    placements: tuple[str, ...]
    dtype: torch.dtype
    lr: float
    s_init: float
    base: str
    store_delta: bool
    bad: tuple[tuple[int, int, float], ...]
    """Steps, parameters, and the nonfinite value of one element of the gradient."""
    without: tuple[tuple[int, int], ...]
    """Steps, and parameters without a gradient in that step."""


PLACEMENTS = {"plain": None, "replicate": Replicate(), "shard 0": Shard(0), "shard 1": Shard(1)}
STEPS = 6


@st.composite
def cases(draw: Any) -> Case:
    shapes = draw(st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4))
    places = [
        draw(st.sampled_from([name for name in PLACEMENTS if name != "shard 1" or len(shape) > 1])) for shape in shapes
    ]
    step, parameter = st.integers(0, STEPS - 1), st.integers(0, len(shapes) - 1)
    bad = st.tuples(step, parameter, st.sampled_from([math.nan, math.inf, -math.inf]))
    return Case(
        world_size=draw(st.integers(1, 3)),
        shapes=tuple(shapes),
        placements=tuple(places),
        dtype=draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])),
        lr=10.0 ** draw(st.integers(-6, 2)),
        s_init=10.0 ** draw(st.integers(-8, -1)),
        base=draw(st.sampled_from(["sgd", "momentum", "adamw"])),
        store_delta=draw(st.booleans()),
        bad=tuple(draw(st.lists(bad, max_size=2))),
        without=tuple(draw(st.lists(st.tuples(step, parameter), max_size=3))),
    )


def make_base(name: str, parameters: list[Any], lr: float) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.1 / lr)
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9 if name == "momentum" else 0.0)


def draw_tensors(case: Case, seed: int) -> list[Tensor]:
    """Numbers that every dtype represents exactly."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).bfloat16().to(case.dtype) for shape in case.shapes]


def gradients(case: Case, step: int) -> list[Tensor | None]:
    """Gradients with a common mean, so that the scale grows."""
    drift, noise = draw_tensors(case, 1), draw_tensors(case, 10 + step)
    found: list[Tensor | None] = [d + 0.5 * n for d, n in zip(drift, noise)]
    for when, index in case.without:
        if when == step:
            found[index] = None
    for when, index, value in case.bad:
        gradient = found[index]
        if when == step and gradient is not None:
            gradient.view(-1)[-1] = value
    return found


def is_bad(case: Case, step: int) -> bool:
    return any(g is not None and not g.isfinite().all() for g in gradients(case, step))


def train(case: Case) -> tuple[float, int, list[Tensor]]:
    """On every rank: S, the number of skipped steps, and the whole parameters."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def place(tensor: Tensor, name: str) -> Tensor:
        placement = PLACEMENTS[name]
        return tensor if placement is None else distribute_tensor(tensor, mesh, [placement])

    parameters = [nn.Parameter(place(x, name)) for x, name in zip(draw_tensors(case, 0), case.placements)]
    optimizer = Mechanic(
        make_base(case.base, parameters, case.lr),
        s_init=case.s_init,
        store_delta=case.store_delta,
        nonfinite="skip",
        variant="optax",
    )
    for step in range(STEPS):
        for parameter, gradient, name in zip(parameters, gradients(case, step), case.placements):
            parameter.grad = None if gradient is None else place(gradient, name)
        optimizer.step()
    optimizer.check_consistency()
    whole = [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in parameters]
    return optimizer.scale.item(), int(optimizer.metrics()["nonfinite_steps"]), [w.clone() for w in whole]


def expect(case: Case) -> tuple[float, int, list[Tensor]]:
    parameters = [x.double().requires_grad_() for x in draw_tensors(case, 0)]
    reference = MechanicReference(parameters, make_base(case.base, parameters, case.lr), "optax", case.s_init)
    skipped = 0
    for step in range(STEPS):
        if is_bad(case, step):
            skipped += 1
            continue
        for parameter, gradient in zip(parameters, gradients(case, step)):
            parameter.grad = None if gradient is None else gradient.double()
        reference.step()
    return reference.scale, skipped, [p.detach() for p in parameters]


def check(case: Case) -> None:
    scale, skipped, parameters = expect(case)
    # Recomputing Delta divides by S + eps, a relative error of eps / S, in the precision of x.
    of_delta = 0.0 if case.store_delta else 3e-8 / case.s_init
    loose = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 0.1}[case.dtype] + 10 * of_delta
    exact = case.store_delta or case.dtype == torch.float64
    for found_scale, found_skipped, found in run(train, case.world_size, case):
        assert found_skipped == skipped
        assert math.isfinite(found_scale)
        if not exact or loose > 0.5:
            continue
        assert found_scale == pytest.approx(scale, rel=loose)
        for mine, theirs in zip(found, parameters):
            assert mine.isfinite().all()
            size = float(theirs.abs().max())
            torch.testing.assert_close(mine.double(), theirs, rtol=loose, atol=loose * max(size, 1.0))


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_equals_the_reference(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(deadline=None, max_examples=1500, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_equals_the_reference_on_more_examples(case: Case) -> None:
    check(case)
