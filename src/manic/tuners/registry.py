"""Which tuner the name of a variant means."""

from __future__ import annotations

from typing import Any

from manic.tuners.base import VARIANTS, Tuner
from manic.tuners.mechanic import Betting
from manic.tuners.multiplicative import Multiplying

__all__ = ["make_tuner"]


def make_tuner(variant: str, **settings: Any) -> Tuner:
    """Make the tuner of a variant.

    Args:
        variant: A name in :data:`manic.tuners.base.VARIANTS`.
        settings: Arguments of :class:`manic.tuners.base.Tuner`.

    Raises:
        ValueError: if there is no such variant, or a setting is out of its range.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {sorted(VARIANTS)}, got {variant!r}")
    kind = Multiplying if VARIANTS[variant].multiplies else Betting
    return kind(VARIANTS[variant], **settings)
