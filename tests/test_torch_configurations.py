"""In every configuration in which torch tests its optimizers, the step equals Algorithm 1 or is refused."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from manic import Mechanic
from manic.tuners.registry import TUNERS
from support.problems import problem, reference_of

STEPS = 10
S_INIT = 1.0
# By name: part of the reason.
REFUSED = {"LBFGS": "evaluates the loss at many points", "SparseAdam": "gradients are sparse"}
NAMES = sorted(
    name
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
)

# Run in a separate process, because the import changes settings of torch and may initialize CUDA. The configurations do
# not need expecttest, which the module imports.
READ = """
import pickle, sys, types, unittest
try:
    import expecttest
except ImportError:
    sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)
from torch.testing._internal.common_optimizers import optim_db
found = {}
for info in optim_db:
    # Configurations listed for CUDA alone also work on a CPU without capturable.
    inputs = [one for device in ("cpu", "cuda") for one in info.optim_inputs_func(device=device)]
    inputs = {one.desc: {k: v for k, v in one.kwargs.items() if k != "capturable"} for one in inputs}
    fused = "fused" in info.supported_impls and "cpu" in info.supports_fused_on
    found[info.optim_cls.__name__] = inputs, [i for i in info.supported_impls if i != "fused" or fused]
with open(sys.argv[1], "wb") as file:
    pickle.dump(found, file)
"""


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, dict[str, Any]], list[str]]]:
    """By optimizer: options by description, and supported implementations."""
    path = tmp_path_factory.mktemp("configurations") / "configurations.pickle"
    result = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"torch.testing._internal.common_optimizers, a private module, has no optim_db to read: {reason}")
    found: dict[str, Any] = pickle.loads(path.read_bytes())
    return found


def configurations(database: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Description and options of each of torch's configurations of ``name``, in every implementation."""
    if name not in database:
        pytest.skip(f"this torch has no test configurations for {name}")
    inputs, implementations = database[name]
    for description, options in inputs.items():
        options = {key: widened(value) for key, value in options.items()}
        yield description, options
        for flag in implementations:
            yield f"{description} & {flag}", {**options, flag: True}


def widened(value: Any) -> Any:
    """Options with tensors in float64, because torch computes with them in their dtype."""
    if isinstance(value, tuple):
        return tuple(map(widened, value))
    return value.double() if isinstance(value, Tensor) else value


def make(name: str, parameters: list[Tensor], options: dict[str, Any]) -> Optimizer:
    optimizer: Optimizer = getattr(torch.optim, name)(parameters, **copy.deepcopy(options))
    return optimizer


@dataclass
class Trajectory:
    """The reference's steps around a base optimizer."""

    gradients: list[list[Tensor | None]] = field(default_factory=list)
    """The gradients at its iterates; in one step, one parameter has none."""
    scales: list[float] = field(default_factory=list)
    parameters: list[list[Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, options: dict[str, Any], variant: str, every_gradient: bool = False) -> Trajectory:
        parameters, loss = problem()
        reference = reference_of(variant, parameters, make(name, parameters, options), S_INIT)
        trajectory = cls()
        for step in range(STEPS):
            for parameter in parameters:
                parameter.grad = None
            loss(step).backward()
            if step == 4 and not every_gradient:
                parameters[1].grad = None
            trajectory.gradients.append([None if p.grad is None else p.grad.clone() for p in parameters])
            reference.step()
            trajectory.scales.append(reference.scale)
            trajectory.parameters.append([p.detach().clone() for p in parameters])
        return trajectory

    def compare(self, optimizer: Mechanic, parameters: list[Tensor], rtol: float, description: str) -> None:
        """Give ``optimizer`` the same gradients; assert that its scales and parameters are equal."""

        def describe(message: str) -> str:
            return f"{description}: {message}"

        for gradients, scale, expected in zip(self.gradients, self.scales, self.parameters):
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = None if gradient is None else gradient.clone()
            optimizer.step()
            assert optimizer.scale.item() == pytest.approx(scale, rel=rtol, abs=0), description
            for parameter, right in zip(parameters, expected):
                torch.testing.assert_close(parameter.detach(), right, rtol=rtol, atol=rtol, msg=describe)


def is_refused(name: str, options: dict[str, Any]) -> bool:
    """Whether the base optimizer refuses the combination of options."""
    try:
        make(name, problem()[0], options)
    except (ValueError, RuntimeError):
        return True
    return False


@pytest.mark.parametrize("variant", TUNERS)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_equals_the_reference(name: str, variant: str, database: Any) -> None:
    compared = 0
    for description, options in configurations(database, name):
        if "differentiable" in options or is_refused(name, options):
            continue
        if variant == "pytorch" and ("foreach" in options or "fused" in options):
            continue  # it takes snapshots in every implementation
        trajectory = Trajectory.of(name, options, variant)
        moved = [(a - b).abs().max().item() for a, b in zip(trajectory.parameters[0], trajectory.parameters[-1])]
        assert min(moved) > 1e-5, f"{description}: the displacement is too small for a comparison"
        parameters, _ = problem()
        optimizer = Mechanic(make(name, parameters, options), variant=variant, s_init=S_INIT)
        trajectory.compare(optimizer, parameters, 1e-9, description)
        compared += 1

        # Recomputing Delta divides by S + eps, a relative error of eps / S. With "pytorch", a parameter without a
        # gradient stays at the position of an earlier S, and Delta would be divided by another S.
        if variant == "pytorch":
            trajectory = Trajectory.of(name, options, variant, every_gradient=True)
        parameters, _ = problem()
        optimizer = Mechanic(make(name, parameters, options), variant=variant, s_init=S_INIT, store_delta=False)
        trajectory.compare(optimizer, parameters, 1e-6, description)
    assert compared >= 4, "torch has fewer configurations than it had"


@pytest.mark.parametrize("name", NAMES)
def test_refuses_unsupported_optimizers_at_construction(name: str, database: Any) -> None:
    for _, options in configurations(database, name):
        parameters, _ = problem()
        if name in REFUSED:
            with pytest.raises(TypeError, match=f"cannot wrap {name}: .*{REFUSED[name]}"):
                Mechanic(make(name, parameters, options), variant="optax")
        elif "differentiable" in options and not is_refused(name, options):
            with pytest.raises(ValueError, match="differentiable=True is not supported"):
                Mechanic(make(name, parameters, options), variant="optax")


def test_covers_every_optimizer_of_torch(database: Any) -> None:
    assert set(database) <= set(NAMES)
