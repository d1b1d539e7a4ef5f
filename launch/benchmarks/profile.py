"""How near methods come, and how often: the numbers over all tasks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

WITHIN = (0.01, 0.02, 0.05, 0.1)


@dataclass(frozen=True)
class Summary:
    """Excesses of one method, summed up."""

    count: int
    median: float
    mean: float
    """Each task counts as 100% at most."""
    worst: float
    within: tuple[float, ...]
    """Shares of tasks within each of :data:`WITHIN`."""


def summary(excesses: Sequence[float]) -> Summary:
    """Sum up the excesses of at least one task."""
    return Summary(
        len(excesses),
        statistics.median(excesses),
        statistics.fmean(min(1.0, value) for value in excesses),
        max(excesses),
        tuple(share_within(excesses, limit) for limit in WITHIN),
    )


def share_within(excesses: Sequence[float], limit: float) -> float:
    """The share of tasks with an excess of at most ``limit``: the performance profile at that place."""
    return sum(value <= limit for value in excesses) / len(excesses)


def least_lead(excesses: Sequence[float], others: Sequence[float], start: float = 0.01, end: float = 1.0) -> float:
    """How far the first profile lies above the second where it does least, from ``start`` to ``end``.

    Only where one of the two still lacks tasks; 0 if there is no such place.
    """
    places = [start, *(value for value in (*excesses, *others) if start < value <= end)]
    shares = [(share_within(excesses, place), share_within(others, place)) for place in places]
    return min((own - other for own, other in shares if min(own, other) < 1.0), default=0.0)


def percent(share: float | None, digits: int = 1) -> str:
    """An excess for a table: a missing one is empty, and an infinite one broke."""
    if share is None:
        return ""
    return f"{100 * share:+.{digits}f}%" if math.isfinite(share) else "broke"
