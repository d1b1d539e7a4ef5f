"""Every supported base optimizer, in all configurations whose steps differ."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class SignMomentum(Optimizer):
    """A third-party optimizer like Lion: decoupled decay, and an update independent of the position."""

    def __init__(self, params: Any, lr: float = 1.0, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p not in self.state:
                    self.state[p]["average"] = torch.zeros_like(p)
                average = self.state[p]["average"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(average.mul(0.9).add(p.grad, alpha=0.1).sign(), alpha=-group["lr"])
                average.lerp_(p.grad, 0.01)


class TrustRatio(Optimizer):
    """A third-party optimizer like LAMB: its update depends on the parameter's norm."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad / (p.grad.norm() + 1e-8), alpha=float(-group["lr"] * p.norm()))


def _cases() -> dict[str, Callable[[Any], Optimizer]]:
    optim = torch.optim
    settings: list[tuple[Callable[..., Optimizer], dict[str, Any]]] = [
        (optim.SGD, {}),
        (optim.SGD, {"momentum": 0.9}),
        (optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (optim.SGD, {"momentum": 0.5, "dampening": 0.1, "maximize": True, "weight_decay": 0.1}),
        (optim.Adam, {}),
        (optim.Adam, {"weight_decay": 0.1, "amsgrad": True}),
        (optim.AdamW, {"weight_decay": 0.1}),
        (optim.AdamW, {"weight_decay": 0.1, "maximize": True}),
        (optim.NAdam, {"weight_decay": 0.1}),
        (optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
        (optim.RAdam, {"weight_decay": 0.1}),
        (optim.RAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
        (optim.Adamax, {"weight_decay": 0.1}),
        (optim.Adagrad, {"weight_decay": 0.1, "lr_decay": 0.01}),
        (optim.RMSprop, {"weight_decay": 0.1}),
        (optim.RMSprop, {"momentum": 0.9, "centered": True}),
        (optim.Adadelta, {"weight_decay": 0.1}),
        (optim.Rprop, {}),
        (optim.ASGD, {"weight_decay": 0.1, "lambd": 0.01}),
        (optim.Adafactor, {"weight_decay": 0.1}),
    ]
    cases: dict[str, Callable[[Any], Optimizer]] = {}
    for cls, options in settings:
        for implementation in ({"foreach": False}, {"foreach": True}, {"fused": True}):
            if "fused" in implementation and cls not in (optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad):
                continue
            name = "-".join(
                [cls.__name__, *options, *(key if value else "loop" for key, value in implementation.items())]
            )
            cases[name] = functools.partial(cls, lr=1.0, **options, **implementation)
    if hasattr(optim, "Muon"):
        cases["Muon"] = functools.partial(optim.Muon, lr=1.0, weight_decay=0.1)
    cases["third-party, position-free"] = functools.partial(SignMomentum, weight_decay=0.1)
    cases["third-party, reads the position"] = TrustRatio
    return cases


CASES = _cases()


def make(name: str, parameters: list[Tensor]) -> Optimizer:
    return CASES[name](parameters)


def maximizes(name: str) -> bool:
    return "maximize" in name
