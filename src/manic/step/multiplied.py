"""What is unlike Algorithm 1 in a step whose scale is on updates: how they are taken, where S begins, when x_ref moves.

It knows what the host knows of S, and no process group: the sum over the ranks is handed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from manic.step.capture import Batch, Iterate, batches, begin_anew, is_proportional, show_updates, write_back
from manic.step.kernels import Kernels, exact
from manic.step.sums import PartialSums, Reduction
from manic.tuners.base import Sums
from manic.tuners.multiplicative import LOOK_EVERY, Multiplying

__all__ = ["MultipliedStep", "largest_lr"]


class MultipliedStep:
    """The host's side of :class:`manic.tuners.multiplicative.Multiplying`.

    Args:
        tuner: Has S.
        may_scale: Whether the host sees the sums before the base optimizers step, so that S can be given to them, and
            may choose how their updates are taken.
    """

    def __init__(self, tuner: Multiplying, may_scale: bool) -> None:
        self._tuner, self._may_scale = tuner, may_scale
        # Whether the host knows that there is a scale, which comes from the first update.
        self.has_scale = False
        # Whether S has fallen, where the host is told in every step; and where not, the tuner's count, None where it is
        # not known either.
        self.has_fallen: bool | None = None
        self.updates_made: int | None = 0

    def resume(self) -> None:
        """Go on from what the tuner holds; the host waits for the device."""
        self.updates_made = max(0, int(self._tuner.updates))
        self.has_scale = float(self._tuner.scale) > 0.0

    def updates_of(self, optimizer: Optimizer, update: str, keeps_delta: Callable[[Tensor], bool]) -> list[str]:
        """Say how the updates of each of an optimizer's groups are taken.

        Args:
            optimizer: A base optimizer.
            update: What :func:`manic.step.capture.resolve_update` made of it.
            keeps_delta: Whether Delta of a parameter is stored. Then x is written from it, and S cannot be left to the
                optimizer; if it is stored of some of a group, all take a snapshot, for the group has one weight decay.
        """
        kept = [[keeps_delta(p) for p in group["params"] if p.requires_grad] for group in optimizer.param_groups]
        if self._can_scale_lr(optimizer) and not any(map(any, kept)):
            return ["scaled"] * len(kept)
        return [update if all(each) else "snapshot" for each in kept]

    def _can_scale_lr(self, optimizer: Optimizer) -> bool:
        if not (self._may_scale and self.has_scale and is_proportional(optimizer)):
            return False
        # A hook may read or set learning rates, and should see the user's. torch has no public way to ask for them.
        return not (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)

    def learn(self, sums: Sums) -> list[Tensor]:
        """Update the tuner, and return what the host is to be told of it: S, and :attr:`Multiplying.has_fallen`."""
        return [self._tuner.update(sums), self._tuner.has_fallen]

    def write(
        self,
        shards: Sequence[Batch],
        scale: Tensor,
        x_square: Tensor,
        kernels: Kernels,
        reduce: Callable[[PartialSums], Reduction],
    ) -> None:
        """Write x_{t+1}, where it is x_t and ``scale`` times the update; the first update gives the scale.

        Args:
            shards: After the base step.
            scale: S, 0-dim, 0 as long as there is none.
            x_square: |x_t|^2 over the whole model, 0-dim.
            kernels: How it is written.
            reduce: Begins the sum over the ranks.
        """
        if not self.has_scale:  # the host waits, until the first update that is not 0
            if not scale > 0:
                updates = PartialSums(exact(), squares=True)
                show_updates(shards, updates.add_position)
                scale = self._tuner.start(reduce(updates).wait().x_square, x_square)
            self.has_scale = bool(scale > 0)
        write_back(shards, self._tuner.position[0], kernels, scale)

    def look_back(self, iterates: Sequence[Iterate], is_capturing: bool) -> None:
        """Every few steps, go back and measure the way anew where the scale has fallen far; the host does not ask.

        Where it has been told, the parameters are gone through only then; otherwise in every step that may say so.
        """
        if is_capturing:  # a graph looks in every step, for it is the same each time, and nobody counts its replays
            self.updates_made = None
        elif self.updates_made is not None:
            self.updates_made += 1
        looks = self.has_fallen
        if looks is None:
            looks = self.updates_made is None or self.updates_made % LOOK_EVERY == 0
        if looks:
            begin_anew(batches(iterates), *self._tuner.look_back())


def largest_lr(param_groups: Iterable[dict[str, Any]]) -> float | Tensor | None:
    """Over the param groups: a 0-dim tensor where one has it on a device, ``None`` where there are no groups."""
    lrs = [group.get("lr", 1.0) for group in param_groups]
    known = [float(lr) for lr in lrs if not isinstance(lr, Tensor) or lr.is_cpu]
    on_device = [lr.reshape(()) for lr in lrs if isinstance(lr, Tensor) and not lr.is_cpu]
    if not on_device:
        return max(known, default=None)
    largest = torch.stack(on_device).max()
    return largest.clamp(min=max(known)) if known else largest
