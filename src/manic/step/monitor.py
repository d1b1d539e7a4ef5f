"""A word, once, when the learned scale cannot be right: it has not left its start, or has run away.

It knows numbers on the host, and nothing of where they come from.
"""

from __future__ import annotations

__all__ = ["INTERVAL", "LARGEST_LEARNING_RATE", "PATIENCE", "TOO_MANY", "Watch"]

PATIENCE = 200
"""Steps in which the scale should have left its start."""

TOO_MANY = 20
"""Steps that are left out one after the other."""

INTERVAL = 1000
"""Steps after which the host asks for the scale, where it does not hear of it in every step."""

LARGEST_LEARNING_RATE = 100.0
"""Effective learning rate, S * lr, above which the scale is taken for a runaway."""


class Watch:
    """Finds words for a scale that is out of the ordinary, each only once; nothing where there is no need."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def stuck(self, scale: float, s_init: float, updates: int) -> str | None:
        """Of a scale that is still where it began, or has not begun."""
        if scale == 0.0:
            return self._once(
                "stuck",
                f"Mechanic has no scale after {updates} steps, for the base optimizer has not moved anything: look at "
                "the learning rate, and at grad_norm in metrics()",
            )
        return self._once(
            "stuck",
            f"Mechanic's scale is {scale:.3g} after {updates} steps: it has not left its start, s_init={s_init:.3g}. "
            "If the loss falls nonetheless, the base lr may be so large that this scale is enough; pass a smaller one. "
            "Otherwise look at metrics(): where grad_norm or the lr is 0 there is nothing to learn from, and where h "
            "stays below eps, a larger lr or s_init helps",
        )

    def skipping(self, in_a_row: int) -> str | None:
        """Of steps that are left out one after the other."""
        if in_a_row < TOO_MANY:
            return None
        return self._once(
            "skipping",
            f"Mechanic has left out {in_a_row} steps in a row, for gradients that are not finite: nothing is learned. "
            "Look for their cause in the data or the loss, or go back to a checkpoint",
        )

    def running(self, scale: float, largest_lr: float, s_max: float | None) -> str | None:
        """Of a scale that is at its bound, or, where it has none, beyond what any run wants."""
        if s_max is not None and scale >= s_max * (1.0 - 1e-12):
            return self._once(
                "bounded",
                f"Mechanic's scale has reached s_max={s_max:.3g} and is held there. If the loss falls, a larger s_max "
                "may be better; if it rises, go back to a checkpoint, and look at these steps' data and gradients",
            )
        if s_max is None and scale * largest_lr > LARGEST_LEARNING_RATE:
            return self._once(
                "runaway",
                f"Mechanic's scale is {scale:.3g}, an effective learning rate of {scale * largest_lr:.3g}. It has "
                "probably run away: go back to a checkpoint, clip gradients, or pass s_max to bound the scale",
            )
        return None

    def _once(self, what: str, message: str) -> str | None:
        if what in self._said:
            return None
        self._said.add(what)
        return message
