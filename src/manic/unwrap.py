"""unwrap: the Mechanic inside what frameworks put around an optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from manic.mechanic import Mechanic

__all__ = ["mechanics", "unwrap"]

# Where wrappers keep what they wrap: Accelerate, DeepSpeed, schedulers and trainers; Lightning; Fabric and torch's
# ZeroRedundancyOptimizer; containers of several optimizers.
_INSIDE = ("optimizer", "_optimizer", "optim", "optimizers")


def unwrap(optimizer: Any) -> Mechanic:
    """Find the :class:`~manic.Mechanic` inside an optimizer that a framework has wrapped.

    Args:
        optimizer: A Mechanic, or what holds one: ``AcceleratedOptimizer``, ``LightningOptimizer``, DeepSpeed's and
            torch's ZeRO optimizers, a scheduler, a trainer, or a list or dict of these.

    Returns:
        The Mechanic, with ``scale``, ``metrics()`` and ``rebase()``.

    Raises:
        TypeError: if there is none.
        ValueError: if there are several.
    """
    found = mechanics(optimizer)
    if not found:
        raise TypeError(
            f"there is no manic.Mechanic in {type(optimizer).__name__}: expected one, or what holds it as one of the "
            f"attributes {', '.join(_INSIDE)}. Pass the optimizer that the framework has wrapped"
        )
    if len(found) > 1:
        raise ValueError(
            f"there are {len(found)} Mechanics in {type(optimizer).__name__}, each with a scale of its own: unwrap one "
            "after the other"
        )
    return found[0]


def mechanics(optimizer: Any) -> list[Mechanic]:
    """All that :func:`unwrap` can find, in order; empty if there is none."""
    return list(_search(optimizer, set()))


def _search(thing: Any, seen: set[int]) -> Iterator[Mechanic]:
    if thing is None or id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Mechanic):
        yield thing
    elif isinstance(thing, dict):
        for each in thing.values():
            yield from _search(each, seen)
    elif isinstance(thing, (list, tuple)):
        for each in thing:
            yield from _search(each, seen)
    else:
        for name in _INSIDE:
            inside = getattr(thing, name, None)
            if not callable(inside):  # a method of that name, as LightningModule.optimizers
                yield from _search(inside, seen)
