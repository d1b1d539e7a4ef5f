"""Which elements stand for a large parameter in the sums of a tuner that needs no more: the same in every layout.

Of every 512 neighbouring columns the first 32, or of every 256 the first 16: whole cache lines. It reads shapes and
placements, and no element.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from manic.distributed.layout import is_fsdp1, local

__all__ = ["FRACTION", "SMALLEST", "copy_of_sample", "is_sampled", "sample_of", "sample_shape", "sample_shaped"]

PERIODS = (512, 256)
"""Of so many neighbouring columns, the first 1/16 are in the sample: the larger if it divides their number."""

FRACTION = 16
"""How many elements stand behind each one of a sample."""

SMALLEST = 1 << 18
"""Parameters with fewer elements are their own sample: of a few hundred, the sums were measured to be too noisy."""


def is_sampled(parameter: Tensor) -> bool:
    """Whether a sixteenth of ``parameter`` stands for all of it.

    It does if the parameter is large and consists of whole periods, and so does what each rank holds of it. The flat
    parameters of FSDP1 have no columns.
    """
    shape = parameter.shape
    if len(shape) < 2 or shape.numel() < SMALLEST or _period(shape[-1]) is None or is_fsdp1(parameter):
        return False
    return not isinstance(parameter, DTensor) or _periods_are_whole(parameter)


def _period(columns: int) -> int | None:
    return next((period for period in PERIODS if columns % period == 0), None)


def _periods_are_whole(parameter: DTensor) -> bool:
    """Whether every rank's columns begin and end where a period of the whole parameter does."""
    last, parts = parameter.dim() - 1, 1
    for size, placement in zip(parameter.device_mesh.shape, parameter.placements):
        if isinstance(placement, Replicate):
            continue
        if getattr(placement, "dim", None) not in range(parameter.dim()):  # a placement that is not known
            return False
        parts *= size if placement.dim == last else 1  # type: ignore[attr-defined]
    period = _period(parameter.shape[-1])
    return period is not None and parameter.shape[-1] % (period * parts) == 0


def sample_shape(shape: Sequence[int]) -> torch.Size:
    """The shape of the sample of a tensor of ``shape``."""
    return torch.Size((*shape[:-1], shape[-1] // FRACTION))


def sample_of(tensor: Tensor, columns: int) -> Tensor:
    """The sample of a plain tensor, shape [rows, its columns / period, period / FRACTION]: a view of a contiguous one.

    Args:
        tensor: What a rank holds of a parameter.
        columns: Those of the whole parameter.
    """
    period = _period(columns)
    assert period is not None
    periods, taken = tensor.shape[-1] // period, period // FRACTION
    if tensor.numel() == 0:
        return tensor.new_empty(0, periods, taken)
    return tensor.reshape(-1, periods, period)[..., :taken]


def sample_shaped(tensor: Tensor, columns: int) -> Tensor:
    """A contiguous tensor of a sample's elements, in the shape that :func:`sample_of` gives a sample."""
    period = _period(columns)
    assert period is not None
    periods, taken = tensor.shape[-1] * FRACTION // period, period // FRACTION
    return tensor.new_empty(0, periods, taken) if tensor.numel() == 0 else tensor.view(-1, periods, taken)


def copy_of_sample(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The sample as a tensor of its own, with the placements of ``tensor``: shape [..., columns / FRACTION]."""
    x = local(tensor)
    plain = torch.empty(sample_shape(x.shape), dtype=dtype, device=x.device)
    sample_shaped(plain, tensor.shape[-1]).copy_(sample_of(x, tensor.shape[-1]))
    if not isinstance(tensor, DTensor):
        return plain
    shape = sample_shape(tensor.shape)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(plain, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=stride)
