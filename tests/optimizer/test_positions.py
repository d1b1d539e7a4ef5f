"""Base optimizers that hold positions of their own are refused on all ranks; others are not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from manic import Mechanic
from manic.optimizer.positions import FIRST_STEPS
from manic.testing import ranks
from support.bases import SignMomentum, TrustRatio
from support.problems import problem


class Base(Optimizer):
    """SGD whose update of one parameter is :meth:`update`."""

    steps = 0

    def __init__(self, params: Any, lr: float = 0.1, **settings: Any) -> None:
        super().__init__(params, {"lr": lr, **settings})
        self.begin()

    def begin(self) -> None:
        """Make what there is from the start."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, self.state[p], group["lr"])

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        raise NotImplementedError


class Masters(Base):
    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        master = state.setdefault("master", p.detach().clone().float())
        p.copy_(master.add_(g, alpha=-lr))


class MastersFromTheStart(Masters):
    def begin(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["master"] = p.detach().clone().float()


class MastersInAList(Base):
    def begin(self) -> None:
        self.masters = [[p.detach().clone().float() for p in group["params"]] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group, masters in zip(self.param_groups, self.masters):
            for p, master in zip(group["params"], masters):
                p.copy_(master.add_(p.grad.float(), alpha=-group["lr"]))


class MastersInAnOptimizer(MastersInAList):
    def begin(self) -> None:
        super().begin()
        self.inner = torch.optim.SGD(self.masters[0], lr=0.1)
        del self.masters

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p, master in zip(self.param_groups[0]["params"], self.inner.param_groups[0]["params"]):
            master.grad = p.grad.float()
        self.inner.step()
        for p, master in zip(self.param_groups[0]["params"], self.inner.param_groups[0]["params"]):
            p.copy_(master)


class FlatMasters(Base):
    """As Megatron: one flat copy of all parameters, with padding."""

    def begin(self) -> None:
        parameters = [p.detach().float().flatten() for group in self.param_groups for p in group["params"]]
        self.flat = torch.cat([*parameters, torch.zeros(5)])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        start = 0
        for group in self.param_groups:
            for p in group["params"]:
                part = self.flat[start : start + p.numel()]
                part.add_(p.grad.float().flatten(), alpha=-group["lr"])
                p.copy_(part.view_as(p))
                start += p.numel()


class FlatMastersInState(FlatMasters):
    def begin(self) -> None:
        super().begin()
        self.state[self.param_groups[0]["params"][0]]["flat"] = self.flat
        self.flat = self.state[self.param_groups[0]["params"][0]]["flat"]


class MastersInAModule(MastersInAList):
    def begin(self) -> None:
        super().begin()
        self.module = nn.ParameterList(nn.Parameter(master) for master in self.masters[0])
        self.masters = [[p.data for p in self.module]]


class MastersByParameter(MastersInAList):
    def begin(self) -> None:
        super().begin()
        self.by_parameter = dict(zip(self.param_groups[0]["params"], self.masters[0]))
        self.masters = [list(self.by_parameter.values())]


class Box:
    """Any object."""


class MastersInAnObject(MastersInAList):
    def begin(self) -> None:
        super().begin()
        self.box = Box()
        self.box.masters = self.masters  # type: ignore[attr-defined]


class Lookahead(Base):
    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        p.add_(g, alpha=-lr)
        if self.steps % 6 == 0:
            slow = state.setdefault("slow", p.detach().clone())
            p.copy_(slow.add_(p - slow, alpha=0.5))


class Averages(Base):
    """The parameter is read from a running average of what it would be."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        fast = state.setdefault("fast", p.detach().clone())
        fast.add_(g, alpha=-lr)
        p.lerp_(fast, 0.1)


class Anchored(Base):
    """As Prodigy and D-Adaptation: the distance from the start tells the step size."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        start = state.setdefault("p0", p.detach().clone())
        p.add_(g, alpha=-lr * (1.0 + float((p - start).norm())))


class AnchoredBySample(Base):
    """As Prodigy with slice_p=2."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        start = state.setdefault("p0", p.flatten()[::2].detach().clone())
        p.add_(g, alpha=-lr * (1.0 + float((p.flatten()[::2] - start).norm())))


class MomentumOfUpdates(Base):
    """Its momentum is the update itself."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        p.add_(state.setdefault("momentum", torch.zeros_like(p)).mul_(0.9).add_(g, alpha=-lr))


class KeepsGradient(Base):
    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        state["previous"] = g.detach().clone()
        p.add_(g, alpha=-lr)


class StartsAtOnes(Base):
    """As timm's RMSprop: the mean square starts at 1."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        square = state.setdefault("square", torch.ones_like(p)).lerp_(g * g, 0.01)
        p.add_(g / square.sqrt(), alpha=-lr)


class HoldsItsParameters(Base):
    def begin(self) -> None:
        self.everything = [p for group in self.param_groups for p in group["params"]]

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        p.add_(g, alpha=-lr)


class KeepsTeacher(KeepsGradient):
    """Holds what the parameters were, as a model to distil from."""

    def begin(self) -> None:
        self.teacher = {"weights": [p.detach().clone() for group in self.param_groups for p in group["params"]]}


class KeepsOddTensors(KeepsGradient):
    """Tensors that cannot be compared."""

    def begin(self) -> None:
        self.odd = [torch.eye(6, 5).to_sparse(), torch.empty(6, 5, device="meta"), torch.eye(6, 5).to_sparse_csr()]


class GlobalEntry(KeepsGradient):
    """Keeps a number in ``state`` beside the parameters'."""

    def begin(self) -> None:
        self.state["total"] = 0  # type: ignore[index, assignment]


REFUSED: list[type[Base]] = [
    Masters, MastersFromTheStart, MastersInAList, MastersInAnOptimizer, MastersInAModule, MastersByParameter,
    MastersInAnObject, FlatMasters, FlatMastersInState, Lookahead, Averages, Anchored, AnchoredBySample,
]  # fmt: skip
ACCEPTED: list[Callable[..., Optimizer]] = [
    MomentumOfUpdates, KeepsGradient, StartsAtOnes, HoldsItsParameters, KeepsTeacher, KeepsOddTensors, GlobalEntry,
    SignMomentum, TrustRatio,
]  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {}, {"variant": "optax"}, {"variant": "pytorch"}, {"nonfinite": "ignore"},
    {"variant": "optax", "store_delta": False}, {"update": "snapshot"}, {"update": "decoupled"},
    {"variant": "optax", "update": "coupled"},
]  # fmt: skip


def train(optimizer: Mechanic, loss: Callable[[int], Tensor], steps: int = FIRST_STEPS + 4) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("base", REFUSED)
def test_refused(base: type[Base], options: dict[str, Any], dtype: torch.dtype) -> None:
    parameters, loss = problem(dtype)
    optimizer = Mechanic(base(parameters), **options)
    with pytest.raises(TypeError, match=f"cannot scale {base.__name__}.*position of parameter 0.*Switch it off"):
        train(optimizer, loss)


@pytest.mark.parametrize("base", [Masters, MastersInAList])
def test_nothing_has_changed_after_the_first_step(base: type[Base]) -> None:
    parameters, loss = problem()
    start = [p.detach().clone() for p in parameters]
    optimizer = Mechanic(base(parameters))
    with pytest.raises(TypeError):
        train(optimizer, loss)
    assert all(torch.equal(p, before) for p, before in zip(parameters, start))
    assert optimizer.scale == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("base", ACCEPTED)
def test_accepted(base: Callable[..., Optimizer], options: dict[str, Any], dtype: torch.dtype) -> None:
    parameters, loss = problem(dtype)
    optimizer = Mechanic(base(parameters, lr=1.0), **options)
    train(optimizer, loss)
    assert optimizer.scale > 0


class StartsAtTheUnitMatrix(Base):
    """As PSGD: a factor of the preconditioner."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        factor = state.setdefault("factor", torch.eye(*p.shape) if p.ndim == 2 else torch.ones_like(p))
        p.add_(g * factor.add_(g, alpha=1e-4).abs().max(), alpha=-lr)


class Masks(Base):
    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        p.add_(g * state.setdefault("mask", (p != 0).to(p.dtype)), alpha=-lr)


STARTS = {
    "zeros": torch.zeros(40), "ones": torch.ones(40), "unit": torch.eye(7), "gradient": torch.linspace(-1, 1, 40),
    "small": torch.full((40,), 1e-3),
}  # fmt: skip


@pytest.mark.parametrize("variant", ["optax", "pytorch", "multiplicative"])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    "base", [MomentumOfUpdates, KeepsGradient, StartsAtOnes, SignMomentum, StartsAtTheUnitMatrix, Masks]
)
def test_accepted_where_state_equals_the_parameter_by_chance(
    base: Callable[..., Optimizer], start: str, variant: str
) -> None:
    """Parameters that start at 0 are their first updates; the gradient of |x|^2 / 2 is x."""
    x = STARTS[start].clone().requires_grad_()
    optimizer = Mechanic(base([x], lr=1.0), variant=variant)
    direction = torch.linspace(-1, 2, x.numel()).view_as(x)
    train(optimizer, lambda step: (x * x).sum() / 2 if start == "gradient" else (x * direction).sum())


class Switches(torch.optim.SGD):
    """As Schedule-Free: the parameters are elsewhere for evaluation."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def test_train_and_eval_are_refused_at_construction() -> None:
    with pytest.raises(TypeError, match="cannot wrap Switches: by its train\\(\\) and eval\\(\\)"):
        Mechanic(Switches(problem()[0], lr=1.0))


@ranks(2)
def test_refused_on_all_ranks_under_fsdp2() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1)).double()  # the last one is on one rank
    fully_shard(model)
    optimizer = Mechanic(Masters(model.parameters()))
    x = torch.randn(8, 6, dtype=torch.float64)
    with pytest.raises(TypeError, match="rank 0: Mechanic cannot scale Masters"):
        train(optimizer, lambda step: model(x).square().mean())


@ranks(2)
def test_refused_on_all_ranks_if_one_stage_has_it() -> None:
    rank = dist.get_rank()
    parameters = [nn.Parameter(torch.randn(4, 4 + rank))]
    optimizer = Mechanic(SignMomentum(parameters) if rank == 0 else Lookahead(parameters), pipeline_stages=2)
    with pytest.raises(TypeError, match="rank 1: Mechanic cannot scale Lookahead"):
        train(optimizer, lambda step: parameters[0].square().mean())


class Lion(SignMomentum):
    """Updates of one length and, here, of one sign: parameters that start at 0 lie on the line of every step."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", [Lion, MomentumOfUpdates, KeepsGradient])
def test_accepted_after_a_resume_of_parameters_that_started_at_zero(
    base: Callable[..., Optimizer], dtype: torch.dtype
) -> None:
    direction = torch.linspace(-1, 2, 40, dtype=dtype)
    saved = None
    for _ in range(4):
        x = torch.zeros(40, dtype=dtype, requires_grad=True)
        optimizer = Mechanic(base([x], lr=1.0), variant="optax")
        if saved is not None:
            optimizer.load_state_dict(saved[0])
            x.data.copy_(saved[1])
        train(optimizer, lambda step, x=x: (x * direction).sum(), 5)  # type: ignore[misc]
        saved = optimizer.state_dict(), x.detach().clone()
    assert optimizer.scale > 0


def test_a_copy_in_the_first_steps_is_not_refused() -> None:
    parameters, loss = problem()
    optimizer = Mechanic(MomentumOfUpdates(parameters, lr=1.0), variant="optax", update="decoupled")
    train(optimizer, loss, 3)
    other = copy.deepcopy(optimizer)
    for parameter in other.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    for _ in range(3):
        other.step()
