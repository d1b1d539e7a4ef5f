"""Which tuner the name of a variant means, and which options it has."""

from __future__ import annotations

import inspect
from typing import Any

from manic.tuners.base import Tuner
from manic.tuners.mechanic import MechanicOptax, MechanicPyTorch
from manic.tuners.multiplicative import Multiplicative
from manic.tuners.state import tag_of

__all__ = ["DEFAULT", "SCALES", "TUNERS", "check_scale", "identify", "make_tuner", "name_of", "with_scales"]

TUNERS: dict[str, type[Tuner]] = {cls.name: cls for cls in (Multiplicative, MechanicOptax, MechanicPyTorch)}
"""The variants, the recommended one first."""

DEFAULT = Multiplicative.name
"""The variant of a Mechanic that names none."""

SCALES = ("global", "per group")
"""For what there may be a scale of its own: all param groups together, or each."""

# With more scales than this a saved tuner is still refused where it does not fit, but not named.
_MOST_GROUPS = 257


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


def check_scale(scale: str, tuner: Tuner) -> None:
    """Check that ``tuner`` can learn so many scales.

    Raises:
        ValueError: if ``scale`` is none of :data:`SCALES`, or not one that the tuner has.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {SCALES}, got {scale!r}")
    if scale != SCALES[0] and not tuner.per_group:
        able = [name for name, each in TUNERS.items() if each.per_group]
        raise ValueError(
            f"variant {tuner.name!r} learns one scale for all param groups: leave out scale={scale!r}, or pass a "
            f"variant that can, one of {able}. A tuner object declares per_group = True if it does so"
        )


def identify(tag: int, *others: Tuner) -> tuple[Tuner | type[Tuner], int | None] | None:
    """The tuner that ``tag`` stands for in a saved state, and how many groups have a scale; ``None``: not known.

    Args:
        tag: See :func:`manic.tuners.state.tag_of`.
        others: Tuners besides :data:`TUNERS` that may have it.
    """
    tuners: tuple[Tuner | type[Tuner], ...] = (*TUNERS.values(), *others)
    for tuner in tuners:
        for groups in (None, *range(1, _MOST_GROUPS if tuner.per_group else 1)):
            if tag == tag_of(tuner.name, tuner.fields, tuner.references, groups):
                return tuner, groups
    return None


def name_of(tag: int, *others: Tuner) -> str:
    """What :func:`identify` finds, in words."""
    found = identify(tag, *others)
    return f"unknown to this version (tag {tag})" if found is None else with_scales(found[0].name, found[1])


def with_scales(name: str, groups: int | None = None) -> str:
    """A variant's name and how many scales it has, in words."""
    return name if groups is None else f"{name} with a scale for each of {groups} param group(s)"
