"""One parameter's local shard as a step sees it, and the batches in which small ones are worked on together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from manic.step.chunks import batched

__all__ = ["Shard", "in_batches"]


@dataclass(eq=False)
class Shard:
    """The part of a parameter on this rank: plain tensors of its shape and on its device, and whose they are."""

    x: Tensor
    """The parameter's storage, of its dtype."""
    x_ref: Tensor
    """Where the displacement is measured from, of the parameter's dtype."""
    delta: Tensor | None
    """Delta, at least float32; ``None`` where it is recomputed from x and x_ref."""
    gradient: Tensor | None
    """Of the step under way."""
    replicas: float
    """How many ranks of the group hold each element."""
    optimizer: Optimizer
    """The base optimizer that has the parameter."""
    group: dict[str, Any]
    """The param group it belongs to."""
    decay_is_decoupled: bool
    """Whether the base optimizer's weight decay acts on the parameter, and not through the gradient."""
    parameter: Tensor
    """The parameter as the base optimizer holds it; a DTensor where it is sharded."""
    whole_delta: Tensor | None
    """What ``delta`` is the local part of."""
    is_new: bool = False
    """x_ref was made of x in this step, and equals it."""
    has_state: bool = True
    """It has had a gradient. Before that it counts in |x|^2, and there is nothing to step on or to write."""


def in_batches(shards: Iterable[Shard], kinds: dict[int, Any]) -> list[list[Shard]]:
    """Put small shards together that are alike.

    Args:
        shards: In the order in which they are worked on.
        kinds: What else must be equal within a batch, by the identity of a shard.
    """

    def kind_of(shard: Shard) -> Any:
        return (id(shard.group), shard.replicas, shard.gradient is None, shard.delta is None, kinds[id(shard)])

    return batched(shards, tensor_of=lambda shard: shard.x, kind_of=kind_of)
