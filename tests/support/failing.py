"""Injected failures: an operator of torch, or a tuner."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from manic.tuners.base import Learned, Sums
from manic.tuners.mechanic import MechanicOptax


class FailsAt(TorchDispatchMode):
    """Raises instead of operator number ``at``, once; counts all operators.

    Args:
        at: Number of the operator, from 1; ``None``: never raise.
        error: The error to raise; default: a MemoryError.
        name: Count only operators whose names start with this; default: all.
    """

    def __init__(self, at: int | None, error: BaseException | None = None, name: str = "") -> None:
        super().__init__()
        self.at, self.count, self.failed_in = at, 0, ""
        self.error, self.name = error or MemoryError("out of luck"), f"aten.{name}"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        counts = func.namespace == "aten" and str(func).startswith(self.name)  # excludes the profiler's markers
        self.count += counts
        if counts and self.count == self.at:
            self.failed_in = str(func)
            raise self.error
        return func(*args, **(kwargs or {}))


# A test of every operator is slow; by default it tries every third, others in other cases.
EVERY = pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)], ids="every {}".format)


def operators(count: int, every: int, case: object) -> range:
    """Numbers of the operators, of ``count``, at which a test fails a step."""
    return range(1 + zlib.crc32(repr(case).encode()) % every, count + 1, every)


class FailingTuner(MechanicOptax):
    """``"optax"``, which raises ``error`` if it is set."""

    error: BaseException | None = None

    def learn(self, state: Mapping[str, Tensor], sums: Sums) -> Learned:
        if self.error is not None:
            raise self.error
        return super().learn(state, sums)
