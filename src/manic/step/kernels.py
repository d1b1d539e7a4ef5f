"""The arithmetic on one piece of a parameter: inner products of tensors side by side, and the write of x.

It knows tensors of equal shape, and nothing of parameters, optimizers or ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["add_product", "inner_products", "set_reference", "working_dtype", "write"]

# Elements copied to float64 at a time.
_EXACT_PIECE = 1 << 20

Pair = tuple[str, str]
"""The names of two operands."""


def working_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which ``tensor``'s elements are multiplied: float64 for float64, float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def inner_products(pairs: Sequence[Pair], operands: Mapping[str, Tensor], *, exact: bool = False) -> list[Tensor]:
    """Multiply operands element by element, and add up.

    Args:
        pairs: Which with which.
        operands: By name, all of one shape.
        exact: In float64, which has room for the square of any float32, where the device has it. Slower.

    Returns:
        One inner product for each pair, of the working dtype, or of float64: 0-dim.
    """
    flat = {name: operands[name].reshape(-1) for name in dict.fromkeys(name for pair in pairs for name in pair)}
    if not exact:
        wide = any(tensor.dtype == torch.float64 for tensor in flat.values())
        return _dots(pairs, flat, torch.float64 if wide else torch.float32)
    has_float64 = all(tensor.device.type != "mps" for tensor in flat.values())
    parts = zip(*(torch.split(tensor, _EXACT_PIECE) for tensor in flat.values()))
    dots = [_dots(pairs, dict(zip(flat, part)), torch.float64 if has_float64 else torch.float32) for part in parts]
    return [torch.stack(column).sum() for column in zip(*dots)]


def _dots(pairs: Sequence[Pair], operands: Mapping[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    wide = {name: tensor.to(dtype) for name, tensor in operands.items()}
    return [torch.dot(wide[one], wide[other]) for one, other in pairs]


def add_product(target: Tensor, x: Tensor, factor: float | Tensor) -> Tensor:
    """``target += factor * x`` in one pass, or none; a factor on the device stays there."""
    if isinstance(factor, Tensor):
        return target.addcmul_(x, factor)
    return target.add_(x, alpha=factor) if factor else target


def write(x: Tensor, x_ref: Tensor, delta: Tensor, factor: Tensor, decay: float | Tensor = 0.0) -> None:
    """Add ``decay * x`` to ``delta``, and make ``x`` what ``x_ref + factor * delta`` is then."""
    add_product(delta, x, decay)
    if x.dtype == delta.dtype == factor.dtype:
        torch.addcmul(x_ref, delta, factor, out=x)
    else:  # low precision: one rounding, at the end
        x.copy_(torch.addcmul(x_ref.to(factor.dtype), delta.to(factor.dtype), factor))


def set_reference(x_ref: Tensor, x: Tensor, delta: Tensor, factor: Tensor) -> None:
    """Make ``x_ref`` what ``x - factor * delta`` is; in low precision, only where x_ref + factor * delta is not x."""
    moved = torch.addcmul(x.to(factor.dtype), delta.to(factor.dtype), factor, value=-1.0)
    if x_ref.dtype != factor.dtype:  # what x has lost to rounding is kept where it can be
        fits = torch.addcmul(x_ref.to(factor.dtype), delta.to(factor.dtype), factor).to(x.dtype) == x
        moved = torch.where(fits, x_ref.to(factor.dtype), moved)
    x_ref.copy_(moved)
