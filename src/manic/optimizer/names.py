"""Names: those under which a checkpoint finds what Mechanic keeps, and a parameter's in messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from manic.tuners.base import MOST_REFERENCES

__all__ = ["DELTA", "GROUP_KEY", "REFERENCES", "STATE_KEYS", "X_REF", "describe", "short_name"]

X_REF = "mechanic_x_ref"
"""Under a parameter: where its displacement is measured from, of its shape, dtype and placements."""
DELTA = "mechanic_delta"
"""Under a parameter: Delta, of its shape and placements, at least float32."""
REFERENCES = (X_REF, *(f"{X_REF}_{index}" for index in range(1, MOST_REFERENCES)))
"""Under a parameter: the points that displacements are measured from, as many of them as the tuner has."""
STATE_KEYS = (*REFERENCES, DELTA)
"""Whatever Mechanic may keep under a parameter."""
GROUP_KEY = "mechanic"
"""In a param group: the tuner's state, see :class:`manic.tuners.state.TunerState`."""


def describe(parameter: Tensor, param_groups: Sequence[Mapping[str, Any]]) -> str:
    """A parameter in words: its place in the groups, its shape, and its name if the groups know it."""
    for index, group in enumerate(param_groups):
        for place, each in enumerate(group["params"]):
            if each is parameter:
                names = group.get("param_names")
                name = f" ({names[place]!r})" if names else ""
                return f"parameter {place} of group {index}{name}, shape {tuple(parameter.shape)}"
    raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is none of this optimizer's")


def short_name(reference: str) -> str:
    """A reference in messages: without the prefix that a checkpoint needs."""
    return reference.removeprefix("mechanic_")
