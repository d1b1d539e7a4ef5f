"""Metrics of the last step, and one warning for each kind of scale that cannot be right.

Training never reads it. The step informs it after it was taken or left out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manic.optimizer.kinds import keeps_place, learning_rate
from manic.tuners.base import Proposal
from manic.tuners.state import TunerState

__all__ = ["IDLE", "INTERVAL", "LARGEST_LEARNING_RATE", "PATIENCE", "TOO_MANY", "Monitor"]

logger = logging.getLogger("manic")

PATIENCE = 200
"""Steps in which the scale should have left its start."""

IDLE = 10
"""Calls before the run's first gradient; frameworks make one, to see the state."""

TOO_MANY = 20
"""Steps that are left out one after the other."""

INTERVAL = 1000
"""Steps after which the monitor asks for the scale, where the host does not read it in every step."""

LARGEST_LEARNING_RATE = 100.0
"""Effective learning rate, S * lr, above which the scale is taken for a runaway."""


class Monitor:
    """Watches one run.

    Args:
        tuner: The tuner's state.
        settings: The tuner's.
    """

    def __init__(self, tuner: TunerState, settings: Mapping[str, Any]) -> None:
        self._tuner, self._settings = tuner, settings
        self._last: Proposal | None = None
        self._warned: set[str] = set()
        self._calls = self._in_a_row = self._idle = 0

    def metrics(self, param_groups: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Of the last step, see :meth:`manic.Mechanic.metrics`."""
        scale = self._tuner.scale
        h = unknown = torch.full_like(scale, math.nan)
        sums = {} if self._last is None else self._last.sums
        if self._last is not None and self._last.scale.shape == scale.shape:  # no group was added since
            h = self._last.signal.to(scale, copy=True).reshape(scale.shape)
        metrics = {
            **_by_group("scale", scale),
            **_by_group("h", h),
            "grad_norm": sums.get("grad_square", unknown).to(scale).sum().sqrt(),
            "param_norm": sums.get("x_square", unknown).to(scale).sum().sqrt(),
            "nonfinite_steps": self._tuner.nonfinite.clone(),
        }
        for index, group in enumerate(param_groups):
            metrics[f"effective_lr/{index}"] = (scale[index] if scale.dim() else scale) * learning_rate(group)
        return metrics

    def step_taken(
        self,
        proposal: Proposal,
        scales: Sequence[float] | None,
        param_groups: Sequence[Mapping[str, Any]],
        logs: bool,
        lrs: Sequence[float] | None = None,
    ) -> None:
        """Watch a step that was taken.

        Args:
            proposal: Its outcome.
            scales: S, or that of each group, where the host knows it.
            param_groups: With their learning rates.
            logs: Whether this rank logs what is the same on all.
            lrs: The largest learning rate of all ranks for each scale, where the host knows it; ``None``: that of
                ``param_groups``.
        """
        self.show(proposal)
        self._calls += 1
        self._in_a_row = 0
        if scales is None and (self._calls == PATIENCE or self._calls % INTERVAL == 0):
            scales = proposal.scale.reshape(-1).tolist()
        if scales is None:
            return
        is_per_group, messages = self._tuner.is_per_group, []
        groups = [[group] for group in param_groups] if is_per_group else [param_groups]
        for index, (scale, mine) in enumerate(zip(scales, groups)):
            of = f" of param group {index}" if is_per_group else ""
            messages.append(self._running(scale, _largest_known_lr(mine) if lrs is None else lrs[index], of))
        if self._calls == PATIENCE:
            for index, has_left in enumerate(self._tuner.has_left_start):
                if not has_left and (not is_per_group or _trains(param_groups[index])):
                    messages.append(self._stuck(scales[index], f" of param group {index}" if is_per_group else ""))
        self._warn(messages, logs)

    def show(self, proposal: Proposal) -> None:
        """Let :meth:`metrics` be of this step, unless the tuner has learned nothing in it."""
        if "grad_square" in proposal.sums:
            self._last = proposal

    def step_without_gradient(self, logs: bool) -> None:
        """Watch a call before the run's first gradient that is not 0."""
        self._idle += 1
        if self._idle == IDLE:
            text = (
                f"Mechanic has taken no step in {IDLE} calls, for every gradient has been 0 or None on all ranks: the "
                "run has not begun. See whether the optimizer has the parameters that train (a framework may have "
                "replaced or frozen the model's since, as PEFT does), and whether backward() is called"
            )
            self._warn([("idle", text)], logs)

    def step_skipped(self, logs: bool) -> None:
        """Watch a step that was left out."""
        self._calls += 1
        self._in_a_row += 1
        if self._in_a_row >= TOO_MANY:
            text = (
                f"Mechanic has left out {self._in_a_row} steps in a row, for gradients that are not finite: nothing is "
                "learned. Look for their cause in the data or the loss, or go back to a checkpoint"
            )
            self._warn([("skipping", text)], logs)

    def _stuck(self, scale: float, of: str) -> tuple[str, str]:
        updates = int(self._tuner.updates)
        if scale == 0.0:
            return f"stuck{of}", (
                f"Mechanic has no scale{of} after {updates} steps, for the base optimizer has not moved anything: look "
                "at the learning rate, and at grad_norm in metrics()"
            )
        return f"stuck{of}", (
            f"Mechanic's scale{of} is {scale:.3g} after {updates} steps: it has not left its start, "
            f"s_init={self._settings.get('s_init', math.nan):.3g}. If the loss falls nonetheless, the base lr may be "
            "so large that this scale is enough; pass a smaller one. Otherwise look at metrics(): where grad_norm or "
            "the lr is 0 there is nothing to learn from, and where h stays below eps, a larger lr or s_init helps"
        )

    def _running(self, scale: float, largest_lr: float, of: str) -> tuple[str, str] | None:
        s_max = self._settings.get("s_max")
        if s_max is not None and scale >= s_max * (1.0 - 1e-12):
            return f"bounded{of}", (
                f"Mechanic's scale{of} has reached s_max={s_max:.3g} and is held there. If the loss falls, a larger "
                "s_max may be better; if it rises, go back to a checkpoint, and look at these steps' data and gradients"
            )
        if s_max is None and scale * largest_lr > LARGEST_LEARNING_RATE:
            return f"runaway{of}", (
                f"Mechanic's scale{of} is {scale:.3g}, an effective learning rate of {scale * largest_lr:.3g}. It has "
                "probably run away: go back to a checkpoint, clip gradients, or pass s_max to bound the scale"
            )
        return None

    def _warn(self, messages: Sequence[tuple[str, str] | None], logs: bool) -> None:
        for message in messages:
            if message is not None and message[0] not in self._warned:
                self._warned.add(message[0])
                if logs:
                    logger.warning(message[1])


def _by_group(name: str, value: Tensor) -> dict[str, Tensor]:
    """A metric, or one for each param group."""
    if value.dim() == 0:
        return {name: value}
    return {f"{name}/{index}": each.clone() for index, each in enumerate(value)}


def _largest_known_lr(param_groups: Sequence[Mapping[str, Any]]) -> float:
    lrs = [learning_rate(group) for group in param_groups]
    return max((float(each) for each in lrs if not isinstance(each, Tensor) or each.is_cpu), default=0.0)


def _trains(group: Mapping[str, Any]) -> bool:
    """Whether a param group is not frozen."""
    return not keeps_place(group) and any(parameter.requires_grad for parameter in group["params"])
