"""The step equals Algorithm 1 for every base optimizer and update rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from manic import Mechanic
from support import bases
from support.problems import problem, reference_of

STEPS = 25
S_INIT = 1e-3


def trajectory(name: str, wrap: object) -> tuple[list[float], list[torch.Tensor]]:
    parameters, loss = problem()
    optimizer = wrap(parameters, bases.make(name, parameters))
    scales = []
    for step in range(STEPS):
        for parameter in parameters:
            parameter.grad = None
        (-loss(step) if bases.maximizes(name) else loss(step)).backward()
        optimizer.step()
        scales.append(float(optimizer.scale))
    return scales, [p.detach() for p in parameters]


OPTIONS = [
    {}, {"update": "snapshot"}, {"store_delta": False}, {"store_delta": False, "update": "snapshot"},
    {"variant": "pytorch"}, {"variant": "pytorch", "store_delta": False},
    {"variant": "multiplicative"}, {"variant": "multiplicative", "update": "snapshot"},
    {"variant": "multiplicative", "store_delta": False},
]  # fmt: skip
# The base optimizer's implementation affects only the use of the parameters' storage.
COMBINATIONS = [
    (name, options)
    for name in bases.CASES
    for options in (OPTIONS[:1] if name.endswith(("foreach", "fused")) else OPTIONS)
]


@pytest.mark.parametrize(("name", "options"), COMBINATIONS)
def test_equals_the_reference(name: str, options: dict[str, Any]) -> None:
    variant = str(options.get("variant", "optax"))
    expected_scales, expected = trajectory(name, lambda ps, base: reference_of(variant, ps, base, S_INIT))
    scales, parameters = trajectory(
        name, lambda _, base: Mechanic(base, s_init=S_INIT, **{"variant": "optax", **options})
    )
    # Recomputing Delta divides by S + eps, a relative error of eps / S, 1e-5 here; Muon computes in bfloat16.
    rtol = 1e-3 if options.get("store_delta") is False else 1e-9
    if name == "Muon":
        rtol = 2e-2
    torch.testing.assert_close(torch.tensor(scales), torch.tensor(expected_scales), rtol=rtol, atol=0.0)
    for mine, theirs in zip(parameters, expected):
        torch.testing.assert_close(mine, theirs, rtol=10 * rtol, atol=rtol)
    start, _ = problem()
    moved = max(float((a - b).detach().abs().max()) for a, b in zip(start, expected))
    assert moved > 1e-3, "the displacement is too small for a comparison"
    assert len(set(expected_scales)) > STEPS // 2


def test_third_party_updates_can_be_declared_position_free() -> None:
    name = "third-party, position-free"
    by_snapshot = trajectory(name, lambda _, base: Mechanic(base, s_init=S_INIT, variant="optax"))
    declared = trajectory(name, lambda _, base: Mechanic(base, s_init=S_INIT, update="decoupled", variant="optax"))
    assert declared[0] == pytest.approx(by_snapshot[0], rel=1e-9)


def test_a_subclass_of_a_known_optimizer_is_not_assumed_position_free() -> None:
    class Reads(torch.optim.SGD):
        """Halves its position, independent of the gradient."""

        @torch.no_grad()
        def step(self, closure: object = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p, alpha=0.5)

    parameter = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = Mechanic(Reads([parameter], lr=1.0), s_init=0.1, variant="optax")
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    displacement = optimizer.state[parameter]["mechanic_delta"]
    assert torch.equal(displacement, torch.full_like(parameter, -0.5))
