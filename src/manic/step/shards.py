"""One parameter's local shard as a step sees it, and the batches in which small ones are worked on together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from manic.distributed.layout import local_gradient, local_storage
from manic.distributed.sample import FRACTION
from manic.step.chunks import batched

__all__ = ["Shard", "in_batches"]


@dataclass(eq=False)
class Shard:
    """The part of a parameter on this rank: whose it is, and the plain tensors of it. It holds none of these itself,
    so that whoever exchanges or offloads them frees their memory."""

    find: Callable[[Optimizer, Sequence[Tensor]], list[list[Tensor | None]]]
    """Finds what is stored under parameters: a list for each reference, x_ref first, and for Delta; ``None``: not."""
    optimizer: Optimizer
    """The base optimizer that has the parameter."""
    group: dict[str, Any]
    """The param group it belongs to."""
    parameter: Tensor
    """The parameter as the base optimizer holds it; a DTensor where it is sharded."""
    column: int
    """The place of its S among all scales."""
    weight: float
    """What an element counts in early sums: 1 over the number of ranks of the group that hold it, times 16 in a sample.
    """
    replicas: float
    """How many ranks of the group hold each element."""
    decay_is_decoupled: bool
    """Whether the base optimizer's weight decay acts on the parameter, and not through the gradient."""
    has_state: bool
    """It has had a gradient. Before that it counts in |x|^2, and there is nothing to step on or to write."""
    is_new: bool
    """References were made of x in this step, and equal it."""
    is_sampled: bool = False
    """Early sums are estimated from its sample, and references are of the sample."""
    is_frozen: bool = False
    """Neither a gradient nor ``requires_grad``, but it was trained before: it stays where it is, and in no sum."""
    is_held: bool = False
    """Its learning rate is 0: it stays where it is, and its displacement is in no sum."""

    @property
    def x(self) -> Tensor:
        """The parameter's storage, of its dtype."""
        return local_storage(self.parameter)

    @property
    def gradient(self) -> Tensor | None:
        """Of the elements of x."""
        return local_gradient(self.parameter)

    @property
    def whole_delta(self) -> Tensor | None:
        """Delta as the state holds it, at least float32; ``None`` where it is recomputed from x and x_ref."""
        return self.find(self.optimizer, [self.parameter])[-1][0]

    @property
    def delta(self) -> Tensor | None:
        """The local part of Delta."""
        delta = self.whole_delta
        return None if delta is None else local_storage(delta)

    @property
    def keeps_place(self) -> bool:
        """Whether x stays where it is in this step."""
        return self.is_frozen or self.is_held


def in_batches(shards: Iterable[Shard], kinds: dict[int, Any]) -> list[list[Shard]]:
    """Put small shards together that are alike.

    Args:
        shards: In the order in which they are worked on.
        kinds: What else must be equal within a batch, by the identity of a shard.
    """

    def kind_of(shard: Shard) -> Any:
        gradient = None if shard.gradient is None else shard.gradient.dtype
        alike = shard.weight, shard.replicas, gradient, shard.delta is None, shard.is_frozen, shard.is_sampled
        return (id(shard.group), *alike, kinds[id(shard)])

    def size_of(shard: Shard) -> int:
        return shard.x.numel() // (FRACTION if shard.is_sampled else 1)

    def kind_with_place(shard: Shard) -> Any:
        return shard.x.device, shard.x.dtype, kind_of(shard)

    return batched(shards, size_of, kind_with_place)
