"""The arithmetic on one piece of a parameter: what is summed before the base step, and what is written after it.

Three times the same: from plain operators; compiled, so that several sums or writes take one look at memory; and in
float64, for what float32 has no room for. It knows tensors that lie side by side, and nothing of parameters, optimizers
or ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

__all__ = ["Kernels", "compiled", "exact", "plain", "working_dtype"]


# Elements copied to float64 at a time.
_EXACT_PIECE = 1 << 20


def working_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which ``tensor``'s elements are multiplied: float64 for float64, float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Kernels:
    """Functions on pieces of equal shape; sums are 0-dim and of the working dtype."""

    products: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """``(delta, v)`` to <delta, v> and |v|^2."""
    squares: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """``(delta, x)`` to |delta|^2 and |x|^2."""
    all_products: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
    """``(delta, g, x)`` to <delta, g>, |g|^2, <delta, x> and |x|^2."""
    write: Callable[[Tensor, Tensor, Tensor, float | Tensor, Tensor], None]
    """``(x, x_ref, delta, decay, factor)``: adds ``decay * x`` to delta, and makes x ``x_ref + factor * delta``."""


def add_product(target: Tensor, x: Tensor, factor: float | Tensor) -> Tensor:
    """``target += factor * x`` in one pass, or none; a factor on the device stays there."""
    if isinstance(factor, Tensor):
        return target.addcmul_(x, factor)
    return target.add_(x, alpha=factor) if factor else target


def write(x: Tensor, x_ref: Tensor, delta: Tensor, decay: float | Tensor, factor: Tensor) -> None:
    """See :attr:`Kernels.write`."""
    add_product(delta, x, decay)
    if x.dtype == delta.dtype == factor.dtype:
        torch.addcmul(x_ref, delta, factor, out=x)
    else:  # low precision: one rounding, at the end
        x.copy_(torch.addcmul(x_ref.to(factor.dtype), delta.to(factor.dtype), factor))


def _products(delta: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    dtype = working_dtype(delta)
    delta, v = _vector(delta, dtype), _vector(v, dtype)
    return torch.dot(delta, v), torch.dot(v, v)


def _squares(delta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = working_dtype(delta)
    delta, x = _vector(delta, dtype), _vector(x, dtype)
    return torch.dot(delta, delta), torch.dot(x, x)


def _all_products(delta: Tensor, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_products(delta, g), *_products(delta, x)


def _vector(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    flat = tensor if tensor.ndim == 1 else tensor.reshape(-1)
    return flat if flat.dtype == dtype else flat.to(dtype)


def plain() -> Kernels:
    """From PyTorch's operators."""
    return Kernels(_products, _squares, _all_products, write)


def exact() -> Kernels:
    """In float64, which has room for the squares of any float32, where the device has it. Slower."""

    def products(delta: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.float32 if v.device.type == "mps" else torch.float64
        parts = zip(torch.split(delta.reshape(-1), _EXACT_PIECE), torch.split(v.reshape(-1), _EXACT_PIECE))
        products = [_products(part.to(dtype), other) for part, other in parts]
        first, second = zip(*products)
        return torch.stack(first).sum(), torch.stack(second).sum()

    def squares(delta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return products(delta, delta)[1], products(x, x)[1]

    def all_products(delta: Tensor, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *products(delta, g), *products(delta, x)

    return Kernels(products, squares, all_products, write)


@cache
def compiled() -> Kernels:
    """By ``torch.compile``: compiled at their first use, once for each dtype and device."""

    def products(delta: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        v = v.to(working_dtype(v))
        return (delta * v).sum(), v.square().sum()

    def squares(delta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        delta, x = delta.to(working_dtype(delta)), x.to(working_dtype(x))
        return delta.square().sum(), x.square().sum()

    def all_products(delta: Tensor, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *products(delta, g), *products(delta, x)

    def decay_and_write(x: Tensor, x_ref: Tensor, delta: Tensor, decay: Tensor, factor: Tensor) -> None:
        delta.add_(decay * x)
        x.copy_(x_ref + factor * delta)

    fused = torch.compile(decay_and_write, dynamic=True)

    def write_compiled(x: Tensor, x_ref: Tensor, delta: Tensor, decay: float | Tensor, factor: Tensor) -> None:
        if not isinstance(decay, Tensor):
            if not decay or delta is x:
                return write(x, x_ref, delta, decay, factor)  # one pass already
            decay = torch.full_like(factor, decay)
        fused(x, x_ref, delta, decay, factor)

    return Kernels(
        torch.compile(products, dynamic=True),
        torch.compile(squares, dynamic=True),
        torch.compile(all_products, dynamic=True),
        write_compiled,
    )
