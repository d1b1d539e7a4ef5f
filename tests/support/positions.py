"""Base optimizers that hold positions of their own, or only seem to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


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
        self.state["total"] = 0


class StartsAtTheUnitMatrix(Base):
    """As PSGD: a factor of the preconditioner."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        factor = state.setdefault("factor", torch.eye(*p.shape) if p.ndim == 2 else torch.ones_like(p))
        p.add_(g * factor.add_(g, alpha=1e-4).abs().max(), alpha=-lr)


class Masks(Base):
    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        p.add_(g * state.setdefault("mask", (p != 0).to(p.dtype)), alpha=-lr)
