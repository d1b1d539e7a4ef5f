"""manic's own tuner in plain float64 loops over whole parameters: to read first, and what the tests compare with.

The rule of docs/variants.md for one process, with nothing of manic's other code in it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["MultiplicativeReference"]


class MultiplicativeReference:
    """The tuner around ``base``, which steps on ``parameters``.

    Args:
        parameters: Plain float64 tensors that require gradients.
        base: The base optimizer over them.
        s_init: The length of the first step over that of the parameters.
        beta: The decay factor of the mean squares.
    """

    def __init__(self, parameters: list[Tensor], base: Optimizer, s_init: float = 1e-4, beta: float = 0.99) -> None:
        self.parameters, self.base, self.s_init, self.beta = parameters, base, s_init, beta
        self.x_ref = [p.detach().clone() for p in parameters]
        self.scale = self.agreement = self.weight = self.mean_square = self.mean_square_sized = 0.0
        self.largest_lr = self.peak = 0.0
        self.age = self.updates = 0
        self.came_down = self.has_begun = False

    @torch.no_grad()
    def step(self) -> None:
        """One step, with the gradients that the parameters have; none before the first gradient that is not 0."""
        self.has_begun = self.has_begun or any(
            p.grad is not None and bool((p.grad != 0).any()) for p in self.parameters
        )
        if not self.has_begun:
            return
        still = {id(p) for group in self.base.param_groups if group["lr"] == 0 for p in group["params"]}
        self.held = [id(p) in still or (p.grad is None and not p.requires_grad) for p in self.parameters]
        x = [p.clone() for p in self.parameters]
        delta = [0.0 * p if held else p - x_ref for p, x_ref, held in zip(x, self.x_ref, self.held)]
        signs = [-1.0 if group.get("maximize") else 1.0 for group in self.base.param_groups for _ in group["params"]]
        g = [0.0 * p if p.grad is None else sign * p.grad for p, sign in zip(self.parameters, signs)]
        lr = max(float(group["lr"]) for group in self.base.param_groups)
        self.base.step()
        update = [p - before for p, before in zip(self.parameters, x)]
        self.learn(_dot(delta, g), _dot(g, g), _dot(delta, delta), lr)
        real = [u * (gradient != 0) for u, gradient in zip(update, g)]  # elsewhere it is of weight decay alone
        if self.scale == 0.0 and _dot(real, real) > 0.0:
            counted = [p for p, of in zip(x, self.parameters) if of.requires_grad or of.grad is not None]
            length = math.sqrt(_dot(counted, counted)) or 1.0
            self.scale = self.s_init * length / math.sqrt(_dot(real, real))
        for parameter, before, step in zip(self.parameters, x, update):
            parameter.copy_(before + self.scale * step)
        self.restart(lr)

    def learn(self, delta_grad: float, grad_square: float, delta_square: float, lr: float = 1.0) -> None:
        """Move S."""
        self.updates += 1
        if 0.0 < 4.0 * self.largest_lr < lr:
            self.scale *= 4.0 * self.largest_lr / lr
        if lr > (1.0 + 1e-9) * self.largest_lr:
            self.age, self.came_down = 0, False
        self.age += 1
        self.came_down = self.came_down or lr < (1.0 - 1e-9) * self.largest_lr
        is_constant = self.age > 40 and not self.came_down
        self.largest_lr = max(self.largest_lr, lr)
        if math.sqrt(delta_square) * math.sqrt(grad_square) > 0.0:
            sized = delta_grad / math.sqrt(delta_square)
            cosine = min(max(sized / math.sqrt(grad_square), -1.0), 1.0)
            self.weight = self.beta * self.weight + 1.0 - self.beta
            self.mean_square = self.beta * self.mean_square + (1.0 - self.beta) * cosine**2
            self.mean_square_sized = self.beta * self.mean_square_sized + (1.0 - self.beta) * sized**2
            z = self._over_root(cosine, self.mean_square)
            self.agreement = 0.9 * self.agreement + 0.1 * z
            if is_constant:
                z = self._over_root(sized, self.mean_square_sized)
            rate = 0.1 * (lr / self.largest_lr) * min(1.0, 100 / self.age) if self.largest_lr else 0.0
            self.scale *= math.exp(-rate * z * (1.0 + 2.0 * self.agreement**2))
        self.peak = max(self.peak, self.scale * lr)

    def restart(self, lr: float) -> None:
        """Every tenth step, where S has fallen to a quarter: x_ref moves to x, and early in a schedule x goes back."""
        within_reach = self.scale * self.largest_lr
        if self.updates % 10 or 4.0 * within_reach >= self.peak:
            return
        is_early = self.came_down and lr > 0.97 * self.largest_lr and self.updates <= 1000
        for parameter, x_ref, held in zip(self.parameters, self.x_ref, self.held):
            if is_early and not held:
                parameter.copy_(x_ref + within_reach / self.peak * (parameter - x_ref))
            x_ref.copy_(parameter)
        self.peak = within_reach

    def _over_root(self, value: float, mean_square: float) -> float:
        return 0.0 if mean_square == 0.0 else min(max(value / math.sqrt(mean_square / self.weight), -1.0), 1.0)


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((p * q).sum()) for p, q in zip(a, b))
