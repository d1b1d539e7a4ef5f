"""Algorithm 1 written down once more, in float64 and plain loops, with nothing of manic's own code in it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

BETAS = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)
EPS = 1e-8


class Oracle:
    """Mechanic around ``base``, which steps on ``parameters``: plain float64 tensors that require gradients."""

    def __init__(
        self, parameters: list[Tensor], base: torch.optim.Optimizer, variant: str, s_init: float, s_decay: float = 0.01
    ) -> None:
        self.parameters, self.base, self.variant = parameters, base, variant
        self.s_init, self.s_decay = s_init, s_decay
        n = len(BETAS)
        self.r, self.v = [0.0] * n, [0.0] * n
        self.m = [0.0 if variant == "optax" else 1e-6] * n
        self.s = [s_init if variant == "optax" else 0.0] * n
        self.x_ref = [p.detach().clone() for p in parameters]
        self.delta = [torch.zeros_like(p) for p in parameters]

    @property
    def scale(self) -> float:
        return sum(self.s) if self.variant == "optax" else max(sum(self.s), 0.0)

    @torch.no_grad()
    def step(self) -> None:
        moved = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        counted = list(range(len(self.parameters))) if self.variant == "optax" else moved
        x = [p.clone() for p in self.parameters]
        g = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters]
        signs = {
            id(p): -1.0 if group.get("maximize") else 1.0 for group in self.base.param_groups for p in group["params"]
        }
        self.base.step()
        after = [p.clone() for p in self.parameters]
        y = x if self.variant == "optax" else after

        norm_g = math.sqrt(sum(float((g[i] ** 2).sum()) for i in counted))
        norm_x = math.sqrt(sum(float((y[i] ** 2).sum()) for i in counted))
        pull = self.s_decay * sum(self.s) * norm_g / (norm_x + EPS)
        h = sum(float((self.delta[i] * (signs[id(self.parameters[i])] * g[i] + pull * y[i])).sum()) for i in counted)
        for i in moved:
            self.delta[i] += after[i] - x[i]
        self._tune(h)
        for i in counted:
            self.parameters[i].copy_(self.x_ref[i] + self.scale * self.delta[i])

    def _tune(self, h: float) -> None:
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


class Multiplier:
    """The tuner that multiplies around ``base``: the same, of the rule in docs/variants.md."""

    def __init__(
        self, parameters: list[Tensor], base: torch.optim.Optimizer, s_init: float, beta: float = 0.99
    ) -> None:
        self.parameters, self.base, self.s_init, self.beta = parameters, base, s_init, beta
        self.x_1 = [p.detach().clone() for p in parameters]
        self.scale, self.square, self.weight, self.agreed, self.largest_lr = 0.0, 0.0, 0.0, 0.0, 0.0
        self.since_largest, self.came_down, self.square_sized = 0, False, 0.0

    @torch.no_grad()
    def step(self) -> None:
        x = [p.clone() for p in self.parameters]
        way = [p - x_1 for p, x_1 in zip(x, self.x_1)]
        ascends = [-1.0 if group.get("maximize") else 1.0 for group in self.base.param_groups for _ in group["params"]]
        g = [0.0 * p if p.grad is None else sign * p.grad for p, sign in zip(self.parameters, ascends)]
        lr = max(float(group["lr"]) for group in self.base.param_groups)
        self.base.step()
        update = [p - before for p, before in zip(self.parameters, x)]
        self._tune(_dot(way, g), _dot(g, g), _dot(way, way), lr)
        if self.scale == 0.0 and _dot(update, update) > 0.0:
            self.scale = self.s_init * (math.sqrt(_dot(x, x)) or 1.0) / math.sqrt(_dot(update, update))
        for parameter, before, step in zip(self.parameters, x, update):
            parameter.copy_(before + self.scale * step)

    def _tune(self, way_grad: float, grad_square: float, way_square: float, lr: float = 1.0) -> None:
        if 0.0 < 4.0 * self.largest_lr < lr:
            self.scale *= 4.0 * self.largest_lr / lr
        if lr > (1.0 + 1e-9) * self.largest_lr:
            self.since_largest, self.came_down = 0, False
        self.since_largest += 1
        self.came_down = self.came_down or lr < (1.0 - 1e-9) * self.largest_lr
        is_constant = self.since_largest > 40 and not self.came_down
        self.largest_lr = max(self.largest_lr, lr)
        if math.sqrt(way_square) * math.sqrt(grad_square) == 0.0:
            return
        cosine = min(max(way_grad / math.sqrt(way_square) / math.sqrt(grad_square), -1.0), 1.0)
        sized = way_grad / math.sqrt(way_square)
        self.weight = self.beta * self.weight + 1.0 - self.beta
        self.square = self.beta * self.square + (1.0 - self.beta) * cosine**2
        self.square_sized = self.beta * self.square_sized + (1.0 - self.beta) * sized**2
        sure = self._over_root(cosine, self.square)
        self.agreed = 0.9 * self.agreed + 0.1 * sure
        if is_constant:
            sure = self._over_root(sized, self.square_sized)
        weight = lr / self.largest_lr if self.largest_lr else 0.0
        weight *= min(1.0, 100 / self.since_largest)
        self.scale *= math.exp(-0.1 * weight * sure * (1.0 + 2.0 * self.agreed**2))

    def _over_root(self, value: float, square: float) -> float:
        return 0.0 if square == 0.0 else min(max(value / math.sqrt(square / self.weight), -1.0), 1.0)


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((p * q).sum()) for p, q in zip(a, b))


def oracle_of(
    variant: str, parameters: list[Tensor], base: torch.optim.Optimizer, s_init: float
) -> Oracle | Multiplier:
    if variant == "multiplicative":
        return Multiplier(parameters, base, s_init)
    return Oracle(parameters, base, variant, s_init)


def problem(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Callable[[int], Tensor]]:
    """Two matrices and a function of the step that gives a noisy loss of them."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    parameters = [draw(6, 5).mul_(0.5).requires_grad_(), draw(5, 4).mul_(0.5).requires_grad_()]
    inputs, targets = draw(20, 30, 6), draw(20, 30, 4)

    def loss(step: int) -> Tensor:
        x, y = inputs[step % 20], targets[step % 20]
        return (torch.tanh(x @ parameters[0]) @ parameters[1] - x[:, :4] - 0.1 * y).square().mean()

    return parameters, loss
