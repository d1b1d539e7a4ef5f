"""How S enters x: as the factor on Delta, or as the weight of each update; and which captures serve for that.

A rule knows S as a tensor that it is given, and neither the sums that it was learned from nor the tuner.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from manic.step.capture import (
    Capture,
    Change,
    DeltaAsStandIn,
    DeltaInStorage,
    NoUpdate,
    ScaledLearningRate,
    UpdateInStorage,
)
from manic.step.chunks import Scratch
from manic.step.held import Frozen, Held
from manic.step.position import Position
from manic.step.shards import Shard
from manic.step.snapshot import Snapshot

__all__ = ["Means", "Rule", "ScaleDisplacement", "ScaleUpdates", "rule_for"]


@dataclass(frozen=True)
class Means:
    """What can be done with a base optimizer's update."""

    depends_on_x: bool
    """Nothing but a snapshot tells it, as far as is known."""
    steps_on_any_tensor: bool
    """It takes Delta for the parameter."""
    rests_at_zero: bool
    """At a learning rate of 0 it is known to move nothing."""
    takes_scale: bool
    """It is proportional to the learning rate, which may be another during the step, and the host knows S."""


class Rule(ABC):
    """x_{t+1} from x_ref, Delta, the update and S.

    Args:
        eps: Added to S where Delta is recomputed.
    """

    stores_delta: bool | None
    """Whether Delta is stored by default; ``None``: only of parameters in low precision."""
    place: str
    """Where parameters are between steps, in words."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    @abstractmethod
    def position(self, scale: Tensor) -> Position:
        """Where parameters are between steps, at S_t."""

    @abstractmethod
    def change(self, scale: Tensor) -> Change:
        """What is done with the update, at S_{t+1}."""

    def write(self, captures: Sequence[Capture], scale: Tensor) -> None:
        """Write x_{t+1}, and Delta_{t+1} where it is stored, at the S_{t+1} of each."""
        changes, scratch = [self.change(each) for each in scale.reshape(-1).unbind()], Scratch()
        for capture in captures:
            capture.write(changes[capture.first.column], scratch)

    @abstractmethod
    def captures(self, group: Sequence[Shard], means: Means, keeps_delta: Sequence[bool]) -> list[type[Capture]]:
        """Choose how updates are taken.

        Args:
            group: The shards of one param group.
            means: What the base optimizer allows.
            keeps_delta: Whether Delta is stored, of each trainable parameter of the whole group.

        Returns:
            A capture for each shard.
        """


class ScaleDisplacement(Rule):
    """x = x_ref + S * Delta, where Delta is the sum of the updates."""

    stores_delta = True
    place = "x_ref + S * Delta"

    def position(self, scale: Tensor) -> Position:
        """S_t is the factor."""
        return Position(scale, self.eps)

    def change(self, scale: Tensor) -> Change:
        """Delta += u, and S_{t+1} is the factor."""
        return Change(scale, None)

    def captures(self, group: Sequence[Shard], means: Means, keeps_delta: Sequence[bool]) -> list[type[Capture]]:
        """Delta as stand-in if the base optimizer allows it, else the storage of x; a snapshot if x is read."""

        def capture_of(shard: Shard) -> type[Capture]:
            if not shard.has_state:
                return NoUpdate
            if shard.is_frozen:
                return Held
            if means.depends_on_x or (shard.is_held and not means.rests_at_zero):
                return Snapshot
            if shard.is_held:
                return Held
            if shard.delta is None:
                return DeltaInStorage
            if means.steps_on_any_tensor and shard.delta.dtype == shard.parameter.dtype:
                return DeltaAsStandIn
            return UpdateInStorage

        return [capture_of(shard) for shard in group]


class ScaleUpdates(Rule):
    """x += S * u; so Delta, where it is stored, is x - x_ref with what x lost to rounding."""

    stores_delta = None
    place = "x_ref + Delta"

    def position(self, scale: Tensor) -> Position:
        """The factor is 1: S is in Delta."""
        return Position(scale.new_ones(()), 0.0, is_unit=True)

    def change(self, scale: Tensor) -> Change:
        """Delta += S_{t+1} * u, and the factor is 1."""
        return Change(torch.ones_like(scale), scale)

    def captures(self, group: Sequence[Shard], means: Means, keeps_delta: Sequence[bool]) -> list[type[Capture]]:
        """The learning rate where Delta is nowhere stored.

        Where it is stored of some of a group, all take a snapshot: the group has one weight decay.
        """
        if means.takes_scale and not any(keeps_delta):
            capture: type[Capture] = ScaledLearningRate
        else:
            capture = UpdateInStorage if all(keeps_delta) and not means.depends_on_x else Snapshot
        return [Frozen if shard.is_frozen else capture if shard.has_state else NoUpdate for shard in group]


def rule_for(scales: Literal["displacement", "updates"], eps: float) -> Rule:
    """The rule of a tuner that declares what S multiplies."""
    return {"displacement": ScaleDisplacement, "updates": ScaleUpdates}[scales](eps)
