"""manic's own tuner: S scales each update, and is multiplied by a factor near 1 in every step.

docs/variants.md has the formulas, docs/tuning.md the measurements behind the constants. What a tuner does not know is
in base.py; multiplicative_reference.py has the same rule in plain float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manic.tuners.base import Learned, Restart, Sums, Tuner, checked, checked_betas

__all__ = ["Multiplicative"]

# The largest change of log S in a step when gradients do not agree from step to step.
_RATE = 0.1
# How much more it may be when they do, and how long agreement is remembered.
_AGREED, _MEMORY = 2.0, 0.9
# The age from which on S slows down.
_SETTLED = 100
# The age from which on a learning rate that has not come down is taken for one that will not.
_CONSTANT = 40
# By how much, as a share, learning rates differ that differ by more than rounding.
_DIFFERS = 1e-9
# By how much a new largest learning rate may enlarge an update: a warm-up may start near 0.
_SURGE = 4.0
# How far S may fall below its largest before a restart.
_FALL = 4.0
# A restart takes x back as well if the learning rate has come down, to no less than this share of its largest, up to
# this step.
_BEGUN, _EARLY = 0.97, 1000


class Multiplicative(Tuner):
    """S is moved by factors, and the base learning rate cancels.

    Args:
        betas: The decay factor of the mean squares: one number in (0, 1).
        s_init: The length of the first step over that of the parameters; positive.
        s_max: The largest scale, positive. Default: no bound.

    Raises:
        ValueError: if an argument is out of its range.
    """

    name = "multiplicative"
    scales = "updates"
    sums = ("delta_grad", "grad_square", "delta_square", "x_square", "lr")
    late_sums = ("update_square",)
    late_until_scale = True
    restart_interval = 10
    # agreement: the mean z. mean_square: that of h, whose weights add up to weight; mean_square_sized: that of h times
    # |g|. peak: the largest S times learning rate since x_ref. age: the number of steps since the learning rate was
    # last larger than ever, 1 in that step. came_down: whether it has come down since.
    fields = (
        "agreement", "weight", "mean_square", "s", "betas",
        "largest_lr", "peak", "age", "came_down", "mean_square_sized",
    )  # fmt: skip
    fixed = ("betas",)
    per_group = True

    def __init__(self, betas: Sequence[float] = (0.99,), s_init: float = 1e-4, s_max: float | None = None) -> None:
        self.betas = checked_betas(betas)
        if len(self.betas) > 1:
            raise ValueError(f"variant 'multiplicative' has one beta, got {self.betas}; pass betas=(0.99,) or the like")
        self.s_init = checked("s_init", s_init, 0.0)
        super().__init__(s_max)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments it was made with, by name."""
        return {"betas": self.betas, "s_init": self.s_init, **super().settings}

    def initial(self) -> Mapping[str, float | Sequence[float]]:
        """S is 0 until there is an update to take it from."""
        return {"betas": self.betas}

    def learn(self, state: Mapping[str, Tensor], sums: Sums) -> Learned:
        """Move S by the angle between the gradient and the displacement so far.

        ``h`` is the cosine of the displacement x - x_ref and the gradient. Below 0 it says that a larger displacement
        would have been better. ``z`` is h over its root mean square, which says how sure that is; where z agrees from
        step to step, as it does while S is far too small, S moves faster. All of it is weighed by the learning rate
        over its largest so far: where a schedule lets training settle, S settles too. And the longer ago that largest
        was, the slower S moves: log S by no more in the second half of a run than in its first.

        The cosine weighs small and large gradients alike. That is right while a learning rate that comes down will
        average the noise out. Where the learning rate has stayed at its largest, the noise remains, and gradients are
        weighed by their size instead.
        """
        beta, weight = state["betas"], state["weight"]
        schedule = self._follow(state, sums["lr"])
        is_constant = (schedule["age"] > _CONSTANT) & (schedule["came_down"] == 0)

        length, grad_norm = sums["delta_square"].sqrt(), sums["grad_square"].sqrt()
        is_known = length * grad_norm > 0
        sized = torch.where(is_known, sums["delta_grad"] / length, 0.0)
        h = torch.where(is_known, sized / grad_norm, 0.0).clamp(-1.0, 1.0)
        weight = torch.where(is_known, beta * weight + (1.0 - beta), weight)
        square, square_sized = (
            torch.where(is_known, beta * mean + (1.0 - beta) * value * value, mean)
            for mean, value in ((state["mean_square"], h), (state["mean_square_sized"], sized))
        )
        z = _over_root(h, square / weight).clamp(-1.0, 1.0)
        # No single gradient sways what is remembered of agreement.
        agreed = torch.where(is_known, _MEMORY * state["agreement"] + (1.0 - _MEMORY) * z, state["agreement"])
        z = torch.where(is_constant, _over_root(sized, square_sized / weight).clamp(-1.0, 1.0), z)

        share = torch.where(sums["lr"] > 0, sums["lr"] / schedule["largest_lr"], 0.0)
        rate = _RATE * (_SETTLED / schedule["age"]).clamp(max=1.0) * share * (1.0 + _AGREED * agreed * agreed)
        s = self._bounded(state["s"] * self._surge(state["largest_lr"], sums["lr"]) * torch.exp(-rate * z))
        peak = torch.maximum(state["peak"], s * sums["lr"])
        if "update_square" in sums:
            s = torch.where(s > 0, s, self._first_scale(sums))
        restart, peak = self._restart(s, peak, schedule, sums["lr"], state["updates"] + 1)
        rows = {
            "agreement": agreed, "weight": weight, "mean_square": square, "mean_square_sized": square_sized,
            "s": s, "peak": peak, **schedule,
        }  # fmt: skip
        return Learned(rows, h, restart)

    def rebased(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """S is compared with what it is now."""
        return {"peak": state["s"] * state["largest_lr"]}

    def _first_scale(self, sums: Sums) -> Tensor:
        """S such that the first update that has a length moves x by ``s_init`` of its own; 0 without one."""
        length = torch.where(sums["x_square"] > 0, sums["x_square"].sqrt(), 1.0)
        scale = torch.where(sums["update_square"] > 0, self.s_init * length / sums["update_square"].sqrt(), 0.0)
        scale = torch.where(scale.isfinite(), scale, 0.0)
        return scale if self.s_max is None else scale.clamp(max=self.s_max)

    def _restart(
        self, s: Tensor, peak: Tensor, schedule: Mapping[str, Tensor], lr: Tensor, updates: Tensor
    ) -> tuple[Restart, Tensor]:
        """A restart where S has fallen far; and the peak, which is forgotten then.

        A scale that was too large displaces x too far, and the small scale that is learned from that cannot bring it
        back. S times the largest learning rate is compared with the largest S times learning rate since x_ref: in a
        warm-up S falls as the learning rate grows. Where the learning rate has just started to come down, early in the
        run, x goes back as far as the present S would have moved it. Later, too much would be lost.
        """
        within_reach = s * schedule["largest_lr"]
        has_fallen = (_FALL * within_reach < peak) & (updates % self.restart_interval == 0)
        is_early = (schedule["came_down"] > 0) & (lr > _BEGUN * schedule["largest_lr"]) & (updates <= _EARLY)
        kept = torch.where(has_fallen & is_early, within_reach / peak, 1.0)
        return Restart(has_fallen.to(s.dtype), kept), torch.where(has_fallen, within_reach, peak)

    def _follow(self, state: Mapping[str, Tensor], lr: Tensor) -> dict[str, Tensor]:
        """The rows that tell where in its schedule the learning rate is."""
        largest = state["largest_lr"]
        is_new = lr > (1.0 + _DIFFERS) * largest
        came_down = torch.where(lr < (1.0 - _DIFFERS) * largest, 1.0, state["came_down"])
        return {
            "largest_lr": torch.maximum(largest, lr),
            "age": torch.where(is_new, 0.0, state["age"]) + 1.0,
            "came_down": torch.where(is_new, 0.0, came_down),
        }

    def _surge(self, largest_lr: Tensor, lr: Tensor) -> Tensor:
        """What S is multiplied by where the learning rate is far above all before it; 1 elsewhere."""
        bound = _SURGE * largest_lr
        return torch.where((bound > 0) & (lr > bound), bound / lr, 1.0)


def _over_root(value: Tensor, mean_square: Tensor) -> Tensor:
    return torch.where(mean_square > 0, value / mean_square.sqrt(), 0.0)
