"""Where numbers that are not finite are, once a step's sums have shown that there are some.

It looks at one rank's iterates and asks the others what they found. It is not on the path of a step that is sound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from manic.distributed.startup import gather_objects
from manic.step.capture import Iterate

__all__ = ["NonfiniteError", "account_of_nonfinite"]

# Places named in a message.
_NAMED = 4


class NonfiniteError(RuntimeError):
    """A step was not taken because gradients or parameters are not finite; the message says where."""


def account_of_nonfinite(
    iterates: Iterable[Iterate], name_of: Callable[[Tensor], str], group: ProcessGroup | None
) -> str:
    """Say, alike on every rank, where there is a nan or an infinity.

    Args:
        iterates: The local shards, between steps.
        name_of: Describes a parameter.
        group: The process group, every rank of which must call this; ``None`` for this process alone.

    Returns:
        Ranks, parameters, and how many elements of the gradient, the parameter or Delta are not finite.
    """
    found = [
        f"{count} of {tensor.numel()} local elements of the {what} of {name_of(iterate.parameter)}"
        for iterate in iterates
        for what, tensor in (("gradient", iterate.gradient), ("value", iterate.x), ("displacement", iterate.delta))
        if tensor is not None and (count := int((~torch.isfinite(tensor)).sum()))
    ]
    accounts = [found] if group is None else gather_objects(found, group)
    places = [f"rank {rank}: {place}" for rank, account in enumerate(accounts) for place in account]
    if not places:
        return "every gradient and parameter is finite, but their squares or products have no room in float64"
    more = f"; and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
    return "; ".join(places[:_NAMED]) + more
