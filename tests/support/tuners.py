"""The tuner of an optimizer as stored in a checkpoint: one tensor in the param groups, with named rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from manic.tuners.base import Tuner
from manic.tuners.registry import make_tuner


def state_of(optimizer: Optimizer) -> Tensor:
    """The tuner's tensor; not a copy."""
    tensor: Tensor = optimizer.param_groups[0]["mechanic"]
    return tensor


def rows_of(state: Tensor, variant: str | Tuner = "optax") -> dict[str, Tensor]:
    """Views of the rows by name."""
    return make_tuner(variant).rows(state)


def with_sums(tuner: Tuner, **sums: float) -> dict[str, Any]:
    """Sums for a tuner; those not given are 1."""
    import torch

    names = (*tuner.sums, *(name for name in sums if name not in tuner.sums))
    return {name: torch.tensor(sums.get(name, 1.0), dtype=torch.float64) for name in names}
