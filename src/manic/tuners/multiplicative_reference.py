"""manic's own tuner in plain float64 loops over whole parameters: to read first, and what the tests compare with.

The rule of docs/multiplicative.md for one process, with nothing of manic's other code in it.
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
        rests: After how many steps S is learned in one of how many.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        base: Optimizer,
        s_init: float = 3e-4,
        beta: float = 0.99,
        rests: tuple[int, int] = (1000, 4),
    ) -> None:
        self.parameters, self.base, self.s_init, self.beta, self.rests = parameters, base, s_init, beta, rests
        self.far = [p.detach().clone() for p in parameters]
        self.near = [p.detach().clone() for p in parameters]
        self.scale = self.agreement = self.weight = self.largest_lr = 0.0
        self.mean_square = self.mean_square_sized = 0.0
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
        from_far, from_near = (
            [0.0 * p if held else p - ref for p, ref, held in zip(x, refs, self.held)] for refs in (self.far, self.near)
        )
        signs = [-1.0 if group.get("maximize") else 1.0 for group in self.base.param_groups for _ in group["params"]]
        g = [0.0 * p if p.grad is None else sign * p.grad for p, sign in zip(self.parameters, signs)]
        lr = max(float(group["lr"]) for group in self.base.param_groups)
        self.base.step()
        update = [p - before for p, before in zip(self.parameters, x)]
        counted = [p for p, of in zip(x, self.parameters) if of.requires_grad or of.grad is not None]
        length = math.sqrt(_dot(counted, counted))
        slope = _dot(from_far, g) - 0.7 * _dot(from_near, g)
        far, near = (math.sqrt(_dot(delta, delta)) for delta in (from_far, from_near))
        interval = self.rests[1] if self.updates >= self.rests[0] else 1
        is_due = self.updates % interval == 0
        self.learn(slope, is_due * _dot(g, g), far, near, length, lr, interval)
        real = [u * (gradient != 0) for u, gradient in zip(update, g)]  # elsewhere it is of weight decay alone
        if self.scale == 0.0 and _dot(real, real) > 0.0:
            self.scale = self.s_init * (length or 1.0) / math.sqrt(_dot(real, real))
        for parameter, before, step in zip(self.parameters, x, update):
            parameter.copy_(before + self.scale * step)
        for references, k in ((self.far, 2.0), (self.near, 8.0)):
            for parameter, reference, held in zip(self.parameters, references, self.held):
                if is_due and not held:
                    reference.add_(parameter - reference, alpha=min(1.0, k * interval / self.updates))

    def learn(
        self,
        slope: float,
        grad_square: float,
        far: float,
        near: float,
        length: float,
        lr: float = 1.0,
        interval: int = 1,
    ) -> None:
        """Move S.

        Args:
            slope: The inner product of displacement and gradient.
            grad_square: The gradient's; 0: only the learning rate is followed.
            far: The distance of x from its far reference.
            near: That from its near reference.
            length: That of x from 0.
            lr: The largest learning rate.
            interval: For how many steps this one stands.
        """
        beta = self.beta**interval
        self.updates += 1
        rise = self.largest_lr / max(lr, self.largest_lr) if self.largest_lr else 1.0
        if lr > (1.0 + 1e-9) * self.largest_lr:
            self.age, self.came_down = 0, False
        self.age += 1
        self.came_down = self.came_down or lr < (1.0 - 1e-9) * self.largest_lr
        is_constant = self.age > 40 and not self.came_down
        self.largest_lr = max(self.largest_lr, lr)
        if far * math.sqrt(grad_square) > 0.0:
            sized = slope / far
            cosine = sized / math.sqrt(grad_square)
            self.weight = beta * self.weight + 1.0 - beta
            self.mean_square = beta * self.mean_square + (1.0 - beta) * cosine**2
            self.mean_square_sized = beta * self.mean_square_sized + (1.0 - beta) * sized**2
            value, square = (sized, self.mean_square_sized) if is_constant else (cosine, self.mean_square)
            z = _clipped(value / math.sqrt(square / self.weight)) if square else 0.0
            self.agreement = 0.9 * self.agreement + 0.1 * z
            if near * length > 0.0:
                z = _clipped(z + 0.17 * math.log(near / length / 0.125))
            rate = 0.1 * (lr / self.largest_lr) * min(1.0, 100 / self.age) if self.largest_lr else 0.0
            self.scale *= math.exp(-interval * rate * z * (1.0 + 2.0 * self.agreement**2))
        self.scale *= rise


def _clipped(z: float) -> float:
    return min(max(z, -1.0), 1.0)


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((p * q).sum()) for p, q in zip(a, b))
