"""Where a parameter is: x = x_ref + f * Delta, with Delta recomputed from x, or x verified against it.

It knows the factor f as it is given, S or 1, and no tuner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from manic.step.chunks import Scratch, pieces
from manic.step.kernels import working_dtype

__all__ = ["Position", "displaced", "displacement", "place_of"]


class Position:
    """f_t, on every device that asks for it.

    Args:
        factor: f_t, 0-dim.
        eps: Added to it where Delta is recomputed.
        is_unit: Whether the factor is known to be 1, and eps 0.
    """

    def __init__(self, factor: Tensor, eps: float, *, is_unit: bool = False) -> None:
        self.factor, self.eps, self._is_unit = factor, eps, is_unit
        self._factors = {factor.device: factor}

    def factor_for(self, x: Tensor) -> Tensor:
        """f_t on the device of ``x``, in its working dtype: 0-dim."""
        return self._on(x.device).to(working_dtype(x))

    def divisor_for(self, x: Tensor) -> Tensor:
        """f_t + eps, which recomputed displacements are divided by: 0-dim."""
        return (self._on(x.device) + self.eps).to(working_dtype(x))

    def delta_from(self, x: Tensor, x_ref: Tensor, scratch: Scratch) -> Tensor:
        """Recompute Delta_t from pieces of x_t and x_ref: in ``scratch``, of their shape, in the working dtype."""
        delta = displacement(x, x_ref, scratch)
        return delta if self._is_unit else delta.div_(self.divisor_for(x))

    def _on(self, device: torch.device) -> Tensor:
        if device not in self._factors:
            self._factors[device] = self.factor.to(device)
        return self._factors[device]


def displacement(x: Tensor, reference: Tensor, scratch: Scratch) -> Tensor:
    """``x - reference`` of two pieces: in ``scratch``, where ``x`` may be, in the working dtype."""
    difference = scratch.like(x, working_dtype(x))
    if x.dtype == difference.dtype:
        return torch.sub(x, reference, out=difference)
    return difference.copy_(x).sub_(reference)


def place_of(piece: Mapping[str, Tensor], scratch: Scratch) -> Tensor:
    """Where x is at a factor of 1, in the working dtype: with ``"delta"`` what x lost to rounding is in it.

    Args:
        piece: ``"x"``; or, where Delta is stored, ``"x_ref"`` and ``"delta"``.
        scratch: Where the sum of these is made.
    """
    if "delta" not in piece:
        return piece["x"].to(working_dtype(piece["x"]))
    delta = piece["delta"]
    return torch.add(piece["x_ref"], delta, out=scratch.like(delta, delta.dtype))


def displaced(places: Sequence[tuple[Tensor, Tensor, Tensor]], factor: Tensor, any_factor: bool) -> list[int]:
    """Find parameters that are not at x_ref + f * Delta: something else has written them.

    The host waits for the device.

    Args:
        places: x, x_ref and Delta of each parameter, as local tensors, between steps.
        factor: f_t, 0-dim.
        any_factor: Whether x = x_ref + c * Delta is right for any c, as for tuners that leave a parameter without a
            gradient where an earlier S has put it.

    Returns:
        Indices into ``places``.
    """
    if not places:
        return []
    found = torch.stack([_is_elsewhere(*place, factor.to(place[0].device), any_factor).cpu() for place in places])
    return found.nonzero().flatten().tolist()


def _is_elsewhere(x: Tensor, x_ref: Tensor, delta: Tensor, factor: Tensor, any_factor: bool) -> Tensor:
    whole, dtype = x, working_dtype(x)
    factor = factor.to(dtype)
    if any_factor:
        along, square = torch.zeros_like(factor), torch.zeros_like(factor)
        for x, x_ref_, delta_ in pieces([whole], [x_ref], [delta]):
            along += ((x.to(dtype) - x_ref_) * delta_).sum()
            square += delta_.square().sum()
        factor = along / (square + torch.finfo(dtype).tiny)
    error, size = torch.zeros_like(factor), torch.zeros_like(factor)
    # A checkpoint in low precision may have been loaded into wider parameters: then x is that exact, and no more.
    coarse = {
        kind: torch.ones_like(factor, dtype=torch.bool) for kind in (torch.bfloat16, torch.float16, torch.float32)
    }
    for x, x_ref_, delta_ in pieces([whole], [x_ref], [delta]):
        displacement = factor * delta_
        error += (x.to(dtype) - (x_ref_.to(dtype) + displacement)).square().sum()
        size += x.to(dtype).square().sum() + displacement.square().sum()
        for kind, fits in coarse.items():
            fits &= (x.to(kind).to(x.dtype) == x).all()
    relative = torch.full_like(factor, torch.finfo(whole.dtype).eps)
    absolute = torch.full_like(factor, _smallest(whole.dtype))
    for kind, fits in coarse.items():
        relative = torch.where(fits, relative.clamp(min=torch.finfo(kind).eps), relative)
        absolute = torch.where(fits, absolute.clamp(min=_smallest(kind)), absolute)
    # Written so that a nan is no reason: what is not finite is another matter.
    return error > (4 * relative).square() * size + (4 * absolute).square() * whole.numel()


def _smallest(dtype: torch.dtype) -> float:
    """The distance of numbers near 0, which are not rounded relative to their size."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps
