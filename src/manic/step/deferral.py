"""A step that the host does not wait for: left out on the device if its sums are not finite, known one step later.

It needs base optimizers that leave a step out by a flag on the device. It reads a step's numbers when the next step
begins, where they have long arrived, and knows no parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manic.step.guard import Reading
from manic.tuners.base import Proposal
from manic.tuners.state import HEADER

__all__ = ["Deferral", "left_out_on_device"]

_UPDATES = HEADER.index("updates")


class Deferral:
    """The numbers of the last step, on their way to the host.

    Args:
        proposal: Of that step.
        is_counted: Whether the host has counted it as taken.
    """

    def __init__(self, proposal: Proposal, *, is_counted: bool) -> None:
        self.proposal, self.is_counted = proposal, is_counted
        numbers = Reading.numbers(proposal)
        self._arrival: torch.cuda.Event | None = None
        self._numbers = numbers
        if numbers.is_cuda:
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrival.record()

    def read(self) -> Reading:
        """The numbers. The host waits until the device has reached the step that they are of."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return Reading.of_numbers(self.proposal.sums, self._numbers)

    def __getstate__(self) -> dict[str, Any]:
        if self._arrival is not None:  # it belongs to this process
            self._arrival.synchronize()
        return {**self.__dict__, "_arrival": None}


def left_out_on_device(proposal: Proposal) -> tuple[Proposal, Tensor]:
    """A proposal that changes nothing, but counts, if a sum is not finite.

    Args:
        proposal: Of a tuner, which has learned nothing then, but has counted the step as taken.

    Returns:
        The proposal of a step that is left out then, and the flag: 0-dim float32, 1 if it is.
    """
    is_left_out = ~torch.stack(list(proposal.sums.values())).isfinite().all()
    state = proposal.state.clone()
    state[_UPDATES] -= is_left_out.to(state)
    return (
        Proposal(state, proposal.scale, proposal.signal, proposal.sums, proposal.shares),
        is_left_out.to(torch.float32),
    )
