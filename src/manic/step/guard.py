"""What a step does about numbers that are not finite: raise, skip, or ignore; and the account of where they are.

It reads a proposal's numbers on the host, and asks the other ranks what they found only when something is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from manic.distributed.collectives import from_every_rank
from manic.optimizer.names import describe
from manic.step.shards import Shard
from manic.tuners.base import Proposal

__all__ = ["Guard", "Nonfinite", "NonfiniteError", "Reading", "account_of_nonfinite"]

Nonfinite = Literal["raise", "skip", "ignore"]
"""What a step does with gradients that are not finite."""

# Squares this small may have lost elements to underflow, where they were summed in float32: an element under 1e-19 has
# a square that is none, and 1e10 of them would not come to this.
_SMALLEST_SQUARE = 1e-20
_MUST_NOT_BE_SMALL = ("grad_square", "x_square")
# Places named in a message.
_NAMED = 4


class NonfiniteError(RuntimeError):
    """A step was not taken because gradients or parameters are not finite; the message says where."""


@dataclass(frozen=True)
class Reading:
    """A proposal's numbers on the host."""

    sums: dict[str, list[float]]
    """Of each scale."""
    scales: list[float]

    @staticmethod
    def of(proposal: Proposal) -> Reading:
        """Read them at once. The host waits for the device."""
        return Reading.of_numbers(proposal.sums, Reading.numbers(proposal))

    @staticmethod
    def numbers(proposal: Proposal) -> Tensor:
        """What there is to read, on the device: each sum, and last S."""
        return torch.stack([*proposal.sums.values(), proposal.scale])

    @staticmethod
    def of_numbers(names: Iterable[str], numbers: Tensor) -> Reading:
        """What :meth:`numbers` made, with the names of the sums."""
        *sums, scales = numbers.reshape(len(numbers), -1).tolist()
        return Reading(dict(zip(names, sums)), scales)

    @property
    def is_finite(self) -> bool:
        """Whether all sums are."""
        return _are_finite(self.sums.values())

    @property
    def fits_float32(self) -> bool:
        """Whether float32 has room for what was multiplied: nothing has too large a square, or too small a one.

        A square of 0 among others is that of a param group without gradients, or of zeros.
        """
        columns = [self.sums[name] for name in _MUST_NOT_BE_SMALL if name in self.sums]
        return self.is_finite and all(
            max(squares) > 0.0 and all(square == 0.0 or square >= _SMALLEST_SQUARE for square in squares)
            for squares in columns
        )

    def moves(self, column: int) -> bool:
        """Whether there can be an update at this S, as :meth:`manic.tuners.base.Tuner.moves` knows it."""
        return all(self.sums[name][column] != 0.0 for name in ("grad_square", "lr") if name in self.sums)


class Guard:
    """Decides before anything has changed.

    Args:
        nonfinite: ``"raise"``, ``"skip"`` or ``"ignore"``.

    Raises:
        ValueError: if it is none of these.
    """

    def __init__(self, nonfinite: Nonfinite) -> None:
        if nonfinite not in get_args(Nonfinite):
            raise ValueError(f"nonfinite must be one of {get_args(Nonfinite)}, got {nonfinite!r}")
        self.nonfinite = nonfinite

    @property
    def waits(self) -> bool:
        """Whether the host waits for the sums before the base optimizers step."""
        return self.nonfinite != "ignore"

    @property
    def may_defer(self) -> bool:
        """Whether a step may be left out without an error, so that the host can learn of it later."""
        return self.nonfinite == "skip"

    def refuse_capture(self) -> None:
        """Raise RuntimeError where a CUDA graph is being captured, and the host would have to wait."""
        if self.waits:
            raise RuntimeError(
                f"a step with nonfinite={self.nonfinite!r} cannot be captured in a CUDA graph: the host waits for its "
                'sums. Pass nonfinite="ignore"'
            )

    def skips(
        self, lrs: Iterable[float], number: int, position_is_finite: Callable[[], bool], account: Callable[[], str]
    ) -> bool:
        """Decide on a step whose sums are not finite; alike on every rank, since the sums are.

        Args:
            lrs: Learning rates, if they are among them.
            number: The step's.
            position_is_finite: Finds out, on all ranks, whether parameters and Delta are.
            account: Says, on all ranks, where numbers are that are not finite.

        Returns:
            True: the step is to be left out.

        Raises:
            NonfiniteError: if it is not to be left out, or cannot be.
        """
        for lr in lrs:
            if not math.isfinite(lr):
                raise NonfiniteError(f"step {number} was not taken: a learning rate is {lr}")
        if self.nonfinite == "skip" and position_is_finite():
            return True
        raise NonfiniteError(
            f"step {number} was not taken, for its sums are not finite. {account()}. Parameters, "
            'optimizer and tuner are as before it. nonfinite="skip" leaves out steps with such gradients; parameters '
            "that are not finite are no step's to mend: go back to a checkpoint"
        )


def _are_finite(columns: Iterable[Iterable[float]]) -> bool:
    return all(math.isfinite(value) for column in columns for value in column)


def account_of_nonfinite(
    shards: Iterable[Shard], param_groups: Sequence[Mapping[str, Any]], group: ProcessGroup | None
) -> str:
    """Describe, alike on every rank, where there is a nan or an infinity.

    Args:
        shards: The local shards, between steps.
        param_groups: To name parameters by.
        group: The process group, every rank of which must call this; ``None`` for this process alone.

    Returns:
        Ranks, parameters, and how many elements of the gradient, the parameter or Delta are not finite.
    """
    found = [
        f"{count} of {tensor.numel()} local elements of the {what} of {describe(shard.parameter, param_groups)}"
        for shard in shards
        for what, tensor in (("gradient", shard.gradient), ("value", shard.x), ("displacement", shard.delta))
        if tensor is not None and (count := int((~torch.isfinite(tensor)).sum()))
    ]
    accounts = [found] if group is None else from_every_rank(found, group)
    places = [f"rank {rank}: {place}" for rank, account in enumerate(accounts) for place in account]
    if not places:
        return "every gradient and parameter is finite, but their squares or products have no room in float64"
    more = f"; and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
    return "; ".join(places[:_NAMED]) + more
