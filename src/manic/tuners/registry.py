"""Which tuner the name of a variant means, and which options it has."""

from __future__ import annotations

import inspect
from typing import Any

from manic.tuners.base import Tuner
from manic.tuners.mechanic import MechanicOptax, MechanicPyTorch
from manic.tuners.multiplicative import Multiplicative
from manic.tuners.state import tag_of

__all__ = ["DEFAULT", "TUNERS", "make_tuner", "name_of"]

TUNERS: dict[str, type[Tuner]] = {cls.name: cls for cls in (Multiplicative, MechanicOptax, MechanicPyTorch)}
"""The variants, the recommended one first."""

DEFAULT = Multiplicative.name
"""The variant of a Mechanic that names none."""


def make_tuner(variant: str | Tuner, **options: Any) -> Tuner:
    """Make the tuner of a variant.

    Args:
        variant: A name in :data:`TUNERS`, or a tuner.
        options: Arguments of its class; ``None`` stands for its default.

    Raises:
        ValueError: if there is no such variant, it does not have an option that is given, or a value is out of range.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(variant, Tuner):
        if given:
            raise ValueError(f"variant is a tuner, which has its options already; leave out {sorted(given)}")
        variant.check()
        return variant
    if variant not in TUNERS:
        raise ValueError(f"variant must be one of {sorted(TUNERS)}, or a tuner; got {variant!r}")
    known = list(inspect.signature(TUNERS[variant]).parameters)
    unknown = sorted(given.keys() - known)
    if unknown:
        raise ValueError(f"variant {variant!r} does not have the option(s) {', '.join(unknown)}; it has {known}")
    return TUNERS[variant](**given)


def name_of(tag: int) -> str:
    """The variant that ``tag`` stands for in a saved state."""
    known = {tag_of(name, tuner.fields, tuner.references): name for name, tuner in TUNERS.items()}
    return known.get(tag, f"unknown to this version (tag {tag})")
