"""The faults in a step that are tested in each layout, and their number."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest

LAYOUTS = [
    ("single", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4), ("tp", 2), ("tp+fsdp2", 4), ("mixed", 4),
    ("fsdp1-orig", 2), ("fsdp1-flat", 2), ("fsdp1-hybrid", 4), ("zero1", 2), ("pipeline", 2),
]  # fmt: skip
# Layouts in the default suite; the others are slow.
QUICK = {("ddp", 2), ("fsdp2", 3), ("tp+fsdp2", 4), ("fsdp1-orig", 2), ("zero1", 2)}


@dataclass(frozen=True)
class Gradient:
    """A nonfinite element in one rank's gradients."""

    value: float
    nonfinite: str
    options: tuple[tuple[str, Any], ...] = ()
    base: str = "adamw"

    def __str__(self) -> str:
        return "-".join(
            [f"{self.value}", self.nonfinite, *(f"{key}={value}" for key, value in self.options), self.base]
        )


GRADIENTS = [
    Gradient(math.nan, "raise"),
    Gradient(math.inf, "skip"),
    Gradient(-math.inf, "raise", (("store_delta", False),)),
    Gradient(math.nan, "skip", (("variant", "pytorch"),)),
    Gradient(math.nan, "skip", (("update", "snapshot"),), "sgd"),
    Gradient(math.nan, "skip", (("variant", "multiplicative"),)),
]
ERRORS = ("before the base optimizer's step", "after it", "in the tuner", "while parameters are written")


# After the step, pipeline ranks broadcast parameters; test_lost_ranks.py covers a rank that stops alone.
NO_PIPELINE = [layout for layout in LAYOUTS if layout[0] != "pipeline"]


def quick_first(layouts: list[tuple[str, int]], values: list[Any]) -> list[Any]:
    """All layouts with each value; combinations not in QUICK, or not of the first two values, are slow."""
    return [
        pytest.param(*layout, value, marks=() if layout in QUICK and values.index(value) < 2 else pytest.mark.slow)
        for layout, value in itertools.product(layouts, values)
    ]


def tried(quick: bool = False) -> dict[str, int]:
    """Number of faults in the whole suite, or in the default suite; each fault is tested on every rank."""
    parameters = {"gradients": quick_first(LAYOUTS, GRADIENTS), "errors": quick_first(NO_PIPELINE, list(ERRORS))}
    return {
        name: sum(each.values[1] for each in cases if not (quick and each.marks)) for name, cases in parameters.items()
    }
