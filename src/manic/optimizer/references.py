"""The references under a parameter: which there are, how one is made from the parameter, and how all are set to it.

It knows one parameter at a time, and nothing of what a step does with the references.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from manic.distributed.layout import local
from manic.distributed.sample import copy_of_sample, sample_of, sample_shape
from manic.optimizer.names import REFERENCES, short_name
from manic.step.chunks import lie_side_by_side
from manic.step.kernels import working_dtype

__all__ = ["References", "is_of_sample", "new_reference"]


def new_reference(parameter: Tensor, dtype: torch.dtype, *, of_sample: bool = False) -> Tensor:
    """Make a reference that is where ``parameter`` is now, or its sample."""
    x = parameter.detach()
    if of_sample:
        return copy_of_sample(x, dtype)
    return x.clone() if x.dtype == dtype else x.to(dtype)


def is_of_sample(parameter: Tensor, shape: Sequence[int]) -> bool:
    """Whether a reference of ``shape`` is one of the sample of ``parameter``."""
    is_other = parameter.dim() > 1 and parameter.shape != shape
    return is_other and shape == sample_shape(parameter.shape)


class References:
    """What a tuner's references are under each parameter.

    Args:
        rates: How fast each follows x; see :attr:`manic.tuners.base.Tuner.references`.
    """

    def __init__(self, rates: Sequence[float]) -> None:
        self.names = REFERENCES[: len(rates)]
        self._follows = dict(zip(self.names, map(bool, rates)))

    def complete(self, parameter: Tensor, state: dict[str, Any], *, of_sample: bool) -> None:
        """Store what is missing, of where ``parameter`` is now, and convert what a load left in another form.

        Args:
            parameter: The parameter.
            state: What is stored under it.
            of_sample: Whether references are of the parameter's sample.

        Raises:
            ValueError: if a reference is of the sample, and should be of the whole parameter.
        """
        for name in self.names:
            dtype = self._dtype(name, parameter)
            if name not in state:
                state[name] = new_reference(parameter, dtype, of_sample=of_sample)
                continue
            if is_of_sample(parameter, state[name].shape) != of_sample:
                if not of_sample:
                    raise ValueError(
                        f"{short_name(name)} is of a sample of the parameter, shape {tuple(state[name].shape)}, but "
                        "here it must be of the whole: the state was saved with another store_delta, dtype or "
                        "sharding of columns"
                    )
                state[name] = copy_of_sample(state[name], dtype)
            elif state[name].dtype != dtype:
                state[name] = state[name].to(dtype)

    def join(self, states: Sequence[dict[str, Any]]) -> None:
        """Let references of alike parameters lie side by side in memory, so that one call works on all of them.

        Not those that are DTensors: torch cannot copy a DTensor whose local tensor begins inside of a storage.

        Args:
            states: What is stored under each parameter; completed.
        """
        for name in self.names:
            tensors = [state[name] for state in states]
            if any(isinstance(each, DTensor) for each in tensors) or lie_side_by_side(tensors):
                continue
            flat = torch.cat([each.reshape(-1) for each in tensors])
            for state, old, part in zip(states, tensors, torch.split(flat, [each.numel() for each in tensors])):
                state[name] = part.view(old.shape)

    def move_to(self, parameter: Tensor, state: Mapping[str, Any]) -> None:
        """Set those that there are to where ``parameter`` is now."""
        x = local(parameter)
        for name in self.names:
            if name in state:
                own = local(state[name])
                is_part = is_of_sample(parameter, state[name].shape)
                own.copy_(sample_of(x, parameter.shape[-1]).reshape(own.shape) if is_part else x)

    def _dtype(self, name: str, parameter: Tensor) -> torch.dtype:
        """The parameter's; but an average in low precision would lose its small moves."""
        return working_dtype(parameter) if self._follows[name] else parameter.dtype
