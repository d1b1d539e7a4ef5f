"""The references under a parameter: which there are, how one is made from the parameter, and how all are set to it.

It knows one parameter at a time, and nothing of what a step does with the references.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manic.distributed.layout import local
from manic.optimizer.names import REFERENCES
from manic.step.kernels import working_dtype

__all__ = ["References", "new_reference"]


def new_reference(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Make a reference that is where ``parameter`` is now."""
    x = parameter.detach()
    return x.clone() if x.dtype == dtype else x.to(dtype)


class References:
    """What a tuner's references are under each parameter.

    Args:
        rates: How fast each follows x; see :attr:`manic.tuners.base.Tuner.references`.
    """

    def __init__(self, rates: Sequence[float]) -> None:
        self.names = REFERENCES[: len(rates)]
        self._follows = dict(zip(self.names, map(bool, rates)))

    def found(self, state: Mapping[str, Any] | None) -> tuple[Tensor | None, ...]:
        """What a parameter's state has of them."""
        return tuple(state.get(name) for name in self.names) if state else (None,) * len(self.names)

    def complete(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Store what is missing, of where ``parameter`` is now, and convert what a load left in another dtype."""
        for name in self.names:
            dtype = self._dtype(name, parameter)
            if name not in state:
                state[name] = new_reference(parameter, dtype)
            elif state[name].dtype != dtype:
                state[name] = state[name].to(dtype)

    def move_to(self, parameter: Tensor, state: Mapping[str, Any]) -> None:
        """Set those that there are to where ``parameter`` is now."""
        for name in self.names:
            if name in state:
                local(state[name]).copy_(local(parameter))

    def _dtype(self, name: str, parameter: Tensor) -> torch.dtype:
        """The parameter's; but an average in low precision would lose its small moves."""
        return working_dtype(parameter) if self._follows[name] else parameter.dtype
