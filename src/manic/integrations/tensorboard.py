"""TensorBoard, and every writer with its ``add_scalar``: Mechanic's metrics."""

from __future__ import annotations

from typing import Any, Protocol

from manic.unwrap import unwrap

__all__ = ["log"]


class Writer(Protocol):
    """``torch.utils.tensorboard.SummaryWriter``, or what has its method."""

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int | None = None) -> Any:
        """Write a number."""


def log(writer: Writer, optimizer: Any, step: int, prefix: str = "mechanic/") -> None:
    """Write Mechanic's metrics; one host sync.

    Args:
        writer: ``torch.utils.tensorboard.SummaryWriter``, or one with its ``add_scalar``.
        optimizer: The Mechanic, or what a framework has put around it.
        step: The number of the step.
        prefix: What comes before the metrics' names.

    Raises:
        TypeError: if there is no Mechanic in ``optimizer``.
    """
    for name, value in unwrap(optimizer).metrics(to_host=True).items():
        writer.add_scalar(f"{prefix}{name}", value, step)
