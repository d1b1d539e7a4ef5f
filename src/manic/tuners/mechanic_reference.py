"""Mechanic in plain float64 loops over whole parameters: to read first, and what the tests compare with.

Algorithm 1 of Cutkosky, Defazio and Mehta (arXiv 2306.00144), for one process, with nothing of manic's code in it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["MechanicReference"]

BETAS = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)
EPS = 1e-8


class MechanicReference:
    """Mechanic around ``base``, which steps on ``parameters``.

    Args:
        parameters: Plain float64 tensors that require gradients.
        base: The base optimizer over them.
        variant: ``"optax"`` or ``"pytorch"``.
        s_init: The initial scale.
        s_decay: lambda.
    """

    def __init__(
        self, parameters: list[Tensor], base: Optimizer, variant: str, s_init: float, s_decay: float = 0.01
    ) -> None:
        self.parameters, self.base, self.variant = parameters, base, variant
        self.s_init, self.s_decay = s_init, s_decay
        n = len(BETAS)
        self.r, self.v = [0.0] * n, [0.0] * n
        self.m = [0.0 if variant == "optax" else 1e-6] * n
        self.s = [s_init if variant == "optax" else 0.0] * n
        self.x_ref = [p.detach().clone() for p in parameters]
        self.delta = [torch.zeros_like(p) for p in parameters]
        self.has_begun = False

    @property
    def scale(self) -> float:
        """S."""
        return sum(self.s) if self.variant == "optax" else max(sum(self.s), 0.0)

    @torch.no_grad()
    def step(self) -> None:
        """One step, with the gradients that the parameters have; none before the first gradient that is not 0."""
        with_gradient = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        self.has_begun = self.has_begun or any(p.grad is not None and bool(p.grad.any()) for p in self.parameters)
        if not self.has_begun:
            return
        trained = [i for i, p in enumerate(self.parameters) if p.requires_grad]
        counted = sorted({*trained, *with_gradient}) if self.variant == "optax" else with_gradient
        still = {id(p) for group in self.base.param_groups if group["lr"] == 0 for p in group["params"]}
        held = [i for i, p in enumerate(self.parameters) if id(p) in still or (p.grad is None and not p.requires_grad)]
        moving = [i for i in counted if i not in held]
        signs = {
            id(p): -1.0 if group.get("maximize") else 1.0 for group in self.base.param_groups for p in group["params"]
        }
        x = [p.clone() for p in self.parameters]
        g = [torch.zeros_like(p) if p.grad is None else signs[id(p)] * p.grad for p in self.parameters]
        self.base.step()
        after = [p.clone() for p in self.parameters]
        y = x if self.variant == "optax" else after

        grad_norm = math.sqrt(sum(float((g[i] ** 2).sum()) for i in counted))
        x_norm = math.sqrt(sum(float((y[i] ** 2).sum()) for i in counted))
        pull = self.s_decay * sum(self.s) * grad_norm / (x_norm + EPS)
        h = sum(float((self.delta[i] * (g[i] + pull * y[i])).sum()) for i in moving)
        for i in with_gradient:
            self.delta[i] += after[i] - x[i]
        self.learn(h)
        for i in moving:
            self.parameters[i].copy_(self.x_ref[i] + self.scale * self.delta[i])
        for i in held:
            self.x_ref[i].copy_(self.parameters[i] - self.scale * self.delta[i])

    def learn(self, h: float) -> None:
        """Lines 8 to 14: r, m, v and s of each beta."""
        for i, beta in enumerate(BETAS):
            rewarded = h
            if self.variant == "optax":
                rewarded = min(max(h, -self.m[i]), self.m[i])
                self.m[i] = max(beta * self.m[i], abs(h) + EPS)
            else:
                self.m[i] = max(beta * self.m[i], abs(h))
            self.v[i] = beta**2 * self.v[i] + h**2
            self.r[i] = beta * self.r[i] - rewarded * self.s[i]
            if self.variant == "pytorch":
                self.r[i] = max(self.r[i], 0.0)
            wealth = self.s_init / len(BETAS) * self.m[i] + max(self.r[i], 0.0)
            self.s[i] = wealth / (math.sqrt(self.v[i]) + EPS)
