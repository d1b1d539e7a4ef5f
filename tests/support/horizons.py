"""A tuner with three references, and the same rule in plain float64 loops over whole parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from manic.tuners.base import Learned, Sums, Tuner, early_sums

S_INIT = 1e-2
_WEIGHTS = (0.1, 0.07, 0.05)
# Displacements whose squares are far below it are rounding.
_TINY = 1e-12


class Horizons(Tuner):
    """S falls where the gradients point back to the references, and is a smooth function of every sum."""

    name = "horizons"
    scales = "updates"
    references = (0.0, 2.0, 8.0)
    sums = tuple(name for name in early_sums(3) if name != "delta_x")

    def initial(self) -> Mapping[str, float | Sequence[float]]:
        return {"s": S_INIT}

    def learn(self, state: Mapping[str, Tensor], sums: Sums) -> Learned:
        change = 1e-3 * sums["lr"] / (1.0 + sums["x_square"])
        for weight, end in zip(_WEIGHTS, ("", "_1", "_2")):
            norms = (sums[f"delta_square{end}"] * sums["grad_square"] + _TINY).sqrt()
            change = change - weight * sums[f"delta_grad{end}"] / norms
        return Learned({"s": self._bounded(state["s"] * change.exp())}, change)


class FollowingStart(Horizons):
    """x_ref follows x, too, and a further reference stays."""

    name = "following start"
    references = (1.0, 0.0, 8.0)


class HorizonsReference:
    """The tuner around ``base``, which steps on ``parameters``.

    Args:
        parameters: Plain tensors that require gradients.
        base: The base optimizer over them.
        rates: How fast each reference follows x.
    """

    def __init__(self, parameters: list[Tensor], base: Optimizer, rates: tuple[float, ...]) -> None:
        self.parameters, self.base, self.rates = parameters, base, rates
        self.references = [[p.detach().clone() for p in parameters] for _ in rates]
        self.scale, self.updates = S_INIT, 0

    @torch.no_grad()
    def step(self) -> None:
        held = {id(p) for group in self.base.param_groups if group["lr"] == 0 for p in group["params"]}
        stays = [id(p) in held or not p.requires_grad for p in self.parameters]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        x = [p.clone() for p in self.parameters]
        grad_square = sum(float(g.square().sum()) for g in gradients)
        x_square = sum(float(p.square().sum()) for p, of in zip(x, self.parameters) if of.requires_grad)
        change = 1e-3 * max(group["lr"] for group in self.base.param_groups) / (1.0 + x_square)
        for weight, references in zip(_WEIGHTS, self.references):
            deltas = [0.0 * p if still else p - ref for p, ref, still in zip(x, references, stays)]
            delta_grad = sum(float((d * g).sum()) for d, g in zip(deltas, gradients))
            delta_square = sum(float(d.square().sum()) for d in deltas)
            change -= weight * delta_grad / math.sqrt(delta_square * grad_square + _TINY)
        self.scale *= math.exp(change)
        self.base.step()
        for parameter, before in zip(self.parameters, x):
            parameter.copy_(before + self.scale * (parameter - before))
        self.updates += 1
        for rate, references in zip(self.rates, self.references):
            for parameter, reference, still in zip(self.parameters, references, stays):
                if not still:
                    share = min(1.0, rate / self.updates)
                    reference.copy_((1.0 - share) * reference + share * parameter)
