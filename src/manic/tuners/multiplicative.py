"""manic's own tuner: S scales each update, and is multiplied by a factor near 1 in every step.

docs/multiplicative.md has the formulas, docs/appendix/tuning-rule.md the measurements behind the constants. What a
tuner does not know is in base.py; multiplicative_reference.py has the same rule in plain float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manic.tuners.base import Learned, Sums, Tuner, checked, checked_betas

__all__ = ["Multiplicative"]

# Of which parts of the run the references are averages: the last 1/_FAR, and the last 1/_NEAR.
_FAR, _NEAR = 2.0, 8.0
# The displacement ends at x with this weight, else at the near reference, in which the noise is averaged out.
_PRESENT = 0.3
# How far x usually is from the near reference, relative to |x|; and how much z changes where it is e times as far.
_USUAL, _PULL = 0.125, 0.17
# The largest change of log S in a step when gradients do not agree from step to step.
_RATE = 0.1
# How much more it may be when they do, and how long agreement is remembered.
_AGREED, _MEMORY = 2.0, 0.9
# The age from which on S slows down.
_SETTLED = 100
# After how many steps S has settled, and in one of how many steps it is learned from then on.
_RESTS_AFTER, _INTERVAL = 1000, 4
# The age from which on a learning rate that has not come down is taken for one that will not.
_CONSTANT = 40
# By how much, as a share, learning rates differ that differ by more than rounding.
_DIFFERS = 1e-9


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
    references = (_FAR, _NEAR)
    samples = True
    rests = (_RESTS_AFTER, _INTERVAL)
    sums = (
        "delta_grad", "delta_square", "delta_grad_1", "delta_square_1", "grad_square", "x_square", "lr",
    )  # fmt: skip
    late_sums = ("update_square",)
    late_until_scale = True
    per_group = True
    # agreement: the mean z. mean_square: that of h, whose weights add up to weight. mean_square_sized: that of h times
    # |g|. age: the number of steps since the learning rate was last larger than ever, 1 in that step. came_down:
    # whether it has come down since.
    fields = (
        "agreement", "weight", "mean_square", "s", "betas", "largest_lr", "age", "came_down", "mean_square_sized",
    )  # fmt: skip
    fixed = ("betas",)

    def __init__(self, betas: Sequence[float] = (0.99,), s_init: float = 3e-4, s_max: float | None = None) -> None:
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
        """Move S by the angle between gradient and displacement, and towards a usual length of the displacement.

        ``h`` is the cosine of that angle. Below 0 it says that a larger displacement would have been better. ``z`` is h
        over its root mean square, which says how sure that is; where z agrees from step to step, as it does while S is
        far too small, S moves faster. All of it is weighed by the learning rate over its largest so far: where a
        schedule lets training settle, S settles too. And the longer ago that largest was, the slower S moves: log S by
        no more in the second half of a run than in its first.

        The displacement leads from where x was, in the mean, in the last half of the run, so that an early mistake is
        forgotten, to a point between x and where it was, in the mean, in the last eighth: noise that a falling learning
        rate will average out counts less.

        The cosine weighs small and large gradients alike. That is right while a learning rate that comes down will
        average the noise out. Where the learning rate has stayed at its largest, the noise remains, and gradients are
        weighed by their size instead.
        """
        beta, weight = state["betas"] ** state["interval"], state["weight"]
        schedule = self._follow(state, sums["lr"])
        is_constant = (schedule["age"] > _CONSTANT) & (schedule["came_down"] == 0)

        length, grad_norm = sums["delta_square"].sqrt(), sums["grad_square"].sqrt()
        is_known = length * grad_norm > 0
        slope = sums["delta_grad"] - (1.0 - _PRESENT) * sums["delta_grad_1"]
        sized = torch.where(is_known, slope / length, 0.0)
        h = torch.where(is_known, sized / grad_norm, 0.0)
        weight = torch.where(is_known, beta * weight + (1.0 - beta), weight)
        square, square_sized = (
            torch.where(is_known, beta * mean + (1.0 - beta) * value * value, mean)
            for mean, value in ((state["mean_square"], h), (state["mean_square_sized"], sized))
        )
        z = torch.where(is_constant, _over_root(sized, square_sized / weight), _over_root(h, square / weight))
        z = z.clamp(-1.0, 1.0)
        agreed = torch.where(is_known, _MEMORY * state["agreement"] + (1.0 - _MEMORY) * z, state["agreement"])
        z = torch.where(is_known, (z + self._pull(sums)).clamp(-1.0, 1.0), 0.0)

        share = torch.where(sums["lr"] > 0, sums["lr"] / schedule["largest_lr"], 0.0)
        rate = _RATE * (_SETTLED / schedule["age"]).clamp(max=1.0) * share * (1.0 + _AGREED * agreed * agreed)
        rate = rate * state["interval"]
        # S times the learning rate is what moves x: where the schedule raises the one, the other falls.
        rise = torch.where(state["largest_lr"] > 0, state["largest_lr"] / schedule["largest_lr"], 1.0)
        s = self._bounded(state["s"] * rise * torch.exp(-rate * z))
        if "update_square" in sums:
            s = torch.where(s > 0, s, self._first_scale(sums))
        rows = {
            "agreement": agreed, "weight": weight, "mean_square": square, "mean_square_sized": square_sized, "s": s,
            **schedule,
        }  # fmt: skip
        return Learned(rows, h)

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

    def _pull(self, sums: Sums) -> Tensor:
        """What is added to z: above 0 where x is farther from the near reference than usual; 0 where that is unknown.

        It decides where the slope is mostly noise, and it keeps S from running away, up or down.
        """
        ratio = (sums["delta_square_1"] / sums["x_square"]).sqrt() / _USUAL
        is_known = (sums["delta_square_1"] > 0) & (sums["x_square"] > 0)
        return torch.where(is_known, _PULL * torch.where(is_known, ratio, 1.0).log(), 0.0)

    def _first_scale(self, sums: Sums) -> Tensor:
        """S such that the first update that has a length moves x by ``s_init`` of its own; 0 without one."""
        length = torch.where(sums["x_square"] > 0, sums["x_square"].sqrt(), 1.0)
        scale = torch.where(sums["update_square"] > 0, self.s_init * length / sums["update_square"].sqrt(), 0.0)
        scale = torch.where(scale.isfinite(), scale, 0.0)
        return scale if self.s_max is None else scale.clamp(max=self.s_max)


def _over_root(value: Tensor, mean_square: Tensor) -> Tensor:
    return torch.where(mean_square > 0, value / mean_square.sqrt(), 0.0)
