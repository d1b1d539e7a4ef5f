"""Accelerate: Mechanic's metrics in the trackers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from manic.unwrap import unwrap

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["log"]


def log(accelerator: Accelerator, values: Mapping[str, Any], optimizer: Any, step: int | None = None) -> None:
    """Log ``values`` and Mechanic's metrics with all trackers of an accelerator; one host sync.

    Args:
        accelerator: With ``log_with=`` and after ``init_trackers()``.
        values: As for ``accelerator.log``.
        optimizer: What ``accelerator.prepare`` returned for the optimizer, or the Mechanic.
        step: As for ``accelerator.log``.

    Raises:
        TypeError: if there is no Mechanic in ``optimizer``.
    """
    accelerator.log({**values, **unwrap(optimizer).metrics(to_host=True)}, step=step)
