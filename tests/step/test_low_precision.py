"""Parameters in bfloat16 and float16: agreement with a float32 run, and its limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import SGD, AdamW, Optimizer

from manic import Mechanic
from manic.testing import run
from manic.tuners.mechanic_reference import MechanicReference
from support.problems import problem

Base = Callable[[list[Tensor]], Optimizer]


def adamw(parameters: list[Tensor], **options: Any) -> AdamW:
    return AdamW(parameters, **{"lr": 1.0, "weight_decay": 0.1, "fused": True, **options})


class Bowl:
    """Noisy gradients of a quadratic function, exact in ``dtype``; their mean goes to zero near the minimum."""

    def __init__(self, dtype: torch.dtype, size: float = 0.5, noise: float = 0.3) -> None:
        self._generator = torch.Generator().manual_seed(3)
        self._dtype, self._size, self._noise = dtype, size, noise
        self.start = self._draw().to(dtype)
        self._goal = self._draw()

    def _draw(self) -> Tensor:
        return torch.randn(64, 64, generator=self._generator) * self._size

    def gradient(self, x: Tensor) -> Tensor:
        return (x.float() - self._goal + self._noise * self._draw()).to(self._dtype)


def root_mean_square(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [{}, {"update": "snapshot"}, {"store_delta": False}, {"variant": "pytorch"}, {"variant": "multiplicative"}],
)
def test_dtypes_of_the_state(dtype: torch.dtype, options: dict[str, Any]) -> None:
    wide, _ = problem()
    parameters = [p.detach().to(dtype).requires_grad_() for p in wide]
    optimizer = Mechanic(SGD(parameters, lr=1.0, momentum=0.9), s_init=1e-2, **{"variant": "optax", **options})
    for _ in range(20):
        optimizer.zero_grad()
        sum(p.float().square().sum() for p in parameters).backward()
        optimizer.step()
    assert all(p.dtype == dtype and p.isfinite().all() for p in parameters)
    assert optimizer.scale.dtype == torch.float64
    state = optimizer.state[parameters[0]]
    follow_x = options.get("variant") == "multiplicative"
    kinds = {value.dtype for name, value in state.items() if name.startswith("mechanic_x_ref")}
    assert kinds == {torch.float32 if follow_x else dtype}
    if options.get("store_delta", True):
        assert state["mechanic_delta"].dtype == torch.float32


BASES: dict[str, Base] = {
    "SGD": lambda ps: SGD(ps, lr=1.0),
    "SGD, lr 0.1": lambda ps: SGD(ps, lr=0.1),
    "SGD, momentum": lambda ps: SGD(ps, lr=1.0, momentum=0.9),
    "AdamW": adamw,
    "AdamW, loop": lambda ps: adamw(ps, fused=False, foreach=False),
    "AdamW, beta2 0.95": lambda ps: adamw(ps, betas=(0.9, 0.95)),
    "AdamW, lr 0.001": lambda ps: adamw(ps, lr=1e-3),
}


def follow(name: str, dtype: torch.dtype, options: dict[str, Any]) -> tuple[float, float]:
    """Train for 1,000 steps in ``dtype`` and in float32, both on the gradients of the float32 run.

    Returns:
        The largest error of x (root mean square, in units of the dtype's eps relative to x), and the largest relative
        error of S.
    """
    bowl = Bowl(dtype)
    wide, narrow = (bowl.start.to(kind, copy=True).requires_grad_() for kind in (torch.float32, dtype))
    optimizers = [Mechanic(BASES[name]([p]), **{"variant": "optax", **options}) for p in (wide, narrow)]
    lr = optimizers[0].param_groups[0]["lr"]
    of_x, of_scale = [], []
    for step in range(1000):
        gradient = bowl.gradient(wide.detach())
        for parameter, optimizer in zip((wide, narrow), optimizers):
            parameter.grad = gradient.to(parameter.dtype)
            optimizer.param_groups[0]["lr"] = lr * (1 - step / 1000)
            optimizer.step()
        error = root_mean_square(narrow.detach().float() - wide.detach())
        of_x.append(error / (torch.finfo(dtype).eps * root_mean_square(wide.detach())))
        of_scale.append(abs(optimizers[1].scale.item() / optimizers[0].scale.item() - 1))
    assert root_mean_square(wide.detach() - bowl.start.float()) > 0.5, "the displacement is too small"
    return max(of_x), max(of_scale)


# Rounding alone gives an error of 0.24 in x. The rest is due to the base optimizer's state, which has the dtype too: in
# bfloat16, 0.999 times a number rounds to that number, so AdamW's second moment never falls.
@pytest.mark.parametrize(("name", "dtype", "of_x", "of_scale"), [
    ("SGD", torch.bfloat16, 0.3, 2e-3),
    ("SGD, momentum", torch.bfloat16, 0.8, 2e-3),
    ("AdamW, beta2 0.95", torch.bfloat16, 0.7, 2e-3),
    ("AdamW", torch.bfloat16, 20.0, 0.1),
    ("SGD", torch.float16, 0.3, 2e-4),
    ("AdamW, beta2 0.95", torch.float16, 0.7, 2e-4),
])  # fmt: skip
def test_follows_the_float32_run(name: str, dtype: torch.dtype, of_x: float, of_scale: float) -> None:
    found = follow(name, dtype, {})
    assert found[0] < of_x
    assert found[1] < of_scale


@pytest.mark.parametrize(("name", "options"), [
    ("SGD", {"store_delta": False}), ("AdamW, lr 0.001", {"update": "snapshot"}),
], ids=str)  # fmt: skip
def test_diverges_from_it_where_the_docs_say_so(name: str, options: dict[str, Any]) -> None:
    assert follow(name, torch.bfloat16, options)[0] > 100


# Torch's loop implementation of AdamW gives nan in float16: its eps of 1e-8 rounds to 0.
@pytest.mark.parametrize(("name", "dtype"), [
    *((name, torch.bfloat16) for name in BASES), ("SGD, momentum", torch.float16), ("AdamW", torch.float16),
])  # fmt: skip
def test_equals_the_low_precision_base_with_an_exact_sum(name: str, dtype: torch.dtype) -> None:
    """Mechanic adds one rounding of x per step to a base optimizer in low precision."""
    bowl = Bowl(dtype, size=0.02)
    x, update = bowl.start.clone().requires_grad_(), torch.zeros_like(bowl.start).requires_grad_()
    optimizer, base = Mechanic(BASES[name]([x]), s_decay=0.0, variant="optax"), BASES[name]([update])
    (group,) = base.param_groups
    decay = group["lr"] * group["weight_decay"]
    group["weight_decay"] = 0.0
    reference = MechanicReference([], base, "optax", s_init=1e-6)
    start = bowl.start.double()
    delta, right = torch.zeros_like(start), start
    for _ in range(300):
        gradient = bowl.gradient(right)
        x.grad, update.grad = gradient, gradient.clone()
        optimizer.step()
        reference.learn((delta * gradient.double()).sum().item())
        with torch.no_grad():
            update.zero_()
        base.step()
        delta += update.detach().double() - decay * right.to(dtype).double()
        right = start + reference.scale * delta
        error = root_mean_square(x.detach().double() - right) / root_mean_square(right)
        assert error < 0.3 * torch.finfo(dtype).eps
        assert optimizer.scale.item() == pytest.approx(reference.scale, rel=1e-3 if decay else 1e-6)
    # Decay and update are rounded together, without bias.
    error = root_mean_square(optimizer.state[x]["mechanic_delta"].double() - delta) / root_mean_square(delta)
    assert error < (0.1 * torch.finfo(dtype).eps if decay else 1e-6)
    assert root_mean_square(right - start) > 0.02, "the displacement is too small"


def first_steps(wrap: Callable[[list[Tensor]], Any], dtype: torch.dtype) -> tuple[Tensor, Any]:
    """Six steps of 65,536 weights with noisy gradients of a common mean."""
    generator = torch.Generator().manual_seed(3)
    start = (0.02 * torch.randn(256, 256, generator=generator)).bfloat16()
    parameter = start.to(dtype, copy=True).requires_grad_()
    optimizer = wrap([parameter])
    for _ in range(6):
        noise = torch.randn(256, 256, generator=generator).bfloat16()
        parameter.grad = (50.0 * start + noise).to(dtype)
        optimizer.step()
    return parameter.detach(), optimizer


def moved(parameter: Tensor) -> float:
    start = (0.02 * torch.randn(256, 256, generator=torch.Generator().manual_seed(3))).bfloat16()
    return (parameter != start.to(parameter.dtype)).double().mean().item()


def test_does_not_lose_the_first_steps() -> None:
    """They are below the rounding of bfloat16, but appear after the scale has grown."""
    wide, expected = first_steps(lambda ps: Mechanic(adamw(ps), variant="optax"), torch.float32)
    assert moved(wide) > 0.999
    narrow, optimizer = first_steps(lambda ps: Mechanic(adamw(ps), variant="optax"), torch.bfloat16)
    assert (narrow == wide.bfloat16()).double().mean() > 0.999
    assert 0.08 < moved(narrow) < 0.16
    (state,) = optimizer.state.values()
    assert (state["mechanic_delta"] != 0).double().mean() > 0.999
    assert optimizer.scale.item() == pytest.approx(expected.scale.item(), rel=1e-3)


def test_loses_the_first_steps_without_a_stored_delta() -> None:
    narrow, optimizer = first_steps(lambda ps: Mechanic(adamw(ps), store_delta=False, variant="optax"), torch.bfloat16)
    assert moved(narrow) < 0.03
    assert optimizer.scale.item() < 1e-6, "it started at 6e-6, and float32 is at 3.2e-6 then"

    package = pytest.importorskip("mechanic_pytorch")
    theirs, _ = first_steps(lambda ps: package.mechanize(AdamW)(ps, lr=1.0, weight_decay=0.1), torch.bfloat16)
    assert moved(theirs) < 0.001
    wide, _ = first_steps(lambda ps: package.mechanize(AdamW)(ps, lr=1.0, weight_decay=0.1), torch.float32)
    assert moved(wide) > 0.999


def teach(model: nn.Module, optimizer: Mechanic, dtype: torch.dtype, autocast: bool, scaler: Any) -> list[float]:
    """Losses of 200 steps towards a linear map."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(16, 4, generator=generator)
    losses = []
    for _ in range(200):
        inputs = torch.randn(64, 16, generator=generator)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            loss = nn.functional.mse_loss(model(inputs).float(), inputs @ matrix)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))


def learn(dtype: torch.dtype = torch.float32, policy: bool = False) -> tuple[float, float, set[torch.dtype]]:
    """Train float32 parameters with a forward in ``dtype``: the scale, the relative loss, and the state's dtypes."""
    model = network()
    low = dtype != torch.float32
    if policy:
        fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    optimizer = Mechanic(AdamW(model.parameters(), lr=1.0, weight_decay=0.1), variant="optax")
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=2.0**10)
    losses = teach(model, optimizer, dtype, low and not policy, scaler)
    kept = {value.dtype for state in optimizer.state.values() for key, value in state.items() if key != "step"}
    return optimizer.scale.item(), sum(losses[-20:]) / 20 / losses[0], kept


def assert_learns_as_in_float32(found: tuple[float, float, set[torch.dtype]]) -> None:
    scale, fall, _ = learn()
    assert fall < 0.3
    assert found[0] == pytest.approx(scale, rel=0.01)
    assert found[1] == pytest.approx(fall, rel=0.01)
    assert found[2] == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters_under_autocast(dtype: torch.dtype) -> None:
    assert_learns_as_in_float32(learn(dtype))


@pytest.mark.slow
def test_float32_parameters_under_a_mixed_precision_policy() -> None:
    for found in run(learn, 2, torch.bfloat16, True):
        assert_learns_as_in_float32(found)


def test_grad_scaler_refuses_float16_gradients() -> None:
    """Torch's rule, as documented."""
    parameter = torch.ones(3, dtype=torch.float16, requires_grad=True)
    optimizer = Mechanic(SGD([parameter], lr=1.0), variant="optax")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(parameter.sum()).backward()
    with pytest.raises(ValueError, match="unscale FP16 gradients"):
        scaler.step(optimizer)
