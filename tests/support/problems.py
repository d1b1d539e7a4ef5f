"""A small training problem, and the reference implementation of each variant."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from manic.tuners.mechanic_reference import MechanicReference
from manic.tuners.multiplicative_reference import MultiplicativeReference


def reference_of(
    variant: str, parameters: list[Tensor], base: torch.optim.Optimizer, s_init: float
) -> MechanicReference | MultiplicativeReference:
    if variant == "multiplicative":
        return MultiplicativeReference(parameters, base, s_init)
    if variant in ("optax", "pytorch"):
        return MechanicReference(parameters, base, variant, s_init)
    raise ValueError(f"no reference of variant {variant!r}; add it here")


def problem(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Callable[[int], Tensor]]:
    """Two matrices, and a function from the step to their noisy loss."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    parameters = [draw(6, 5).mul_(0.5).requires_grad_(), draw(5, 4).mul_(0.5).requires_grad_()]
    inputs, targets = draw(20, 30, 6), draw(20, 30, 4)

    def loss(step: int) -> Tensor:
        x, y = inputs[step % 20], targets[step % 20]
        return (torch.tanh(x @ parameters[0]) @ parameters[1] - x[:, :4] - 0.1 * y).square().mean()

    return parameters, loss
