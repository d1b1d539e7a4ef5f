"""Partial sums over the local shards, and the one all_reduce that makes them global.

It reads iterates and weighs each by its number of replicas; it does not know what the sums are for.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from manic.displacement import Iterate, chunks, working_dtype
from manic.tuner import Sums

__all__ = ["Reduction", "gradient_sums", "position_sums"]


def gradient_sums(iterates: Iterable[Iterate], like: Tensor) -> Tensor:
    """Sum <Delta, g> and |g|^2 over this rank's elements; both 0 where there is no gradient.

    Args:
        iterates: The local shards, before the base step.
        like: Gives the result's dtype and device.

    Returns:
        Shape (2,), this rank's share: an element that k ranks hold counts 1/k.
    """
    share = _Share()
    for iterate in iterates:
        if iterate.gradient is None:
            continue
        ascends = iterate.group.get("maximize", False)
        for x, x_ref, delta, gradient in chunks(iterate.x, iterate.x_ref, iterate.delta, iterate.gradient):
            g = _vector(gradient)
            product = torch.dot(_vector(iterate.delta_from(x, x_ref) if delta is None else delta), g)
            share.add(-product if ascends else product, torch.dot(g, g), iterate.replicas)
    return share.total(like)


def position_sums(iterates: Iterable[Iterate], like: Tensor) -> Tensor:
    """Sum <Delta_t, x> and |x|^2 over this rank's elements, x being what the parameters hold now.

    Args:
        iterates: The local shards: before the base step, or with a snapshot after it.
        like: Gives the result's dtype and device.

    Returns:
        Shape (2,), this rank's share: an element that k ranks hold counts 1/k.
    """
    share = _Share()
    for iterate in iterates:
        for x, x_ref, delta, x_before in chunks(iterate.x, iterate.x_ref, iterate.delta, iterate.x_before):
            if delta is None:
                delta = iterate.delta_from(x if x_before is None else x_before, x_ref)
            v = _vector(x)
            share.add(torch.dot(_vector(delta), v), torch.dot(v, v), iterate.replicas)
    return share.total(like)


class Reduction:
    """The step's one collective: an asynchronous all_reduce of four numbers.

    Args:
        gradient: From :func:`gradient_sums`.
        position: From :func:`position_sums`.
        group: The process group, or ``None`` where one process holds everything.
        device: Where the group's backend wants its tensors.
    """

    def __init__(self, gradient: Tensor, position: Tensor, group: ProcessGroup | None, device: torch.device) -> None:
        sums = torch.cat((gradient, position))
        self._home = sums.device
        self._sums = sums.to(device)
        self._work = None if group is None else dist.all_reduce(self._sums, group=group, async_op=True)

    def wait(self) -> Sums:
        """Return the global sums. On CUDA the stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
        return Sums(*self._sums.to(self._home).unbind())


def _vector(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).to(working_dtype(tensor))


class _Share:
    """Pairs of products, kept apart by their number of replicas until they are added in the tuner's dtype."""

    def __init__(self) -> None:
        self._pairs: dict[float, list[Tensor]] = {}

    def add(self, first: Tensor, second: Tensor, replicas: float) -> None:
        self._pairs.setdefault(replicas, []).append(torch.stack((first, second)))

    def total(self, like: Tensor) -> Tensor:
        """Shape (2,), of ``like``'s dtype and device."""
        total = like.new_zeros(2)
        for replicas, pairs in self._pairs.items():
            if len({(pair.dtype, pair.device) for pair in pairs}) > 1:
                pairs = [pair.to(like) for pair in pairs]
            total += torch.stack(pairs).to(like).sum(dim=0) / replicas
        return total
