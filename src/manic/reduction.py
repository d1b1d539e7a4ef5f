"""Partial sums over the local shards, and the one all_reduce that makes them global.

It reads iterates and weighs each by its number of replicas; it does not know what the sums are for.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from manic.displacement import Iterate
from manic.kernels import Kernels
from manic.tuner import Sums

__all__ = ["PartialSums", "Reduction"]


class PartialSums:
    """This rank's share of the four inner products: an element that k ranks hold counts 1/k.

    Its methods are what :func:`manic.displacement.stepping` and :func:`manic.displacement.show` show pieces to.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._gradient: _Products = {}
        self._position: _Products = {}

    def add(self, iterate: Iterate, delta: Tensor, x: Tensor, gradient: Tensor | None) -> None:
        """Add all four."""
        if gradient is None:
            self.add_position(iterate, delta, x, gradient)
        else:
            delta_grad, grad_square, *position = self._kernels.all_products(delta, gradient, x)
            self._note_gradient(iterate, delta_grad, grad_square)
            _note(self._position, iterate, *position)

    def add_gradient(self, iterate: Iterate, delta: Tensor, x: Tensor, gradient: Tensor | None) -> None:
        """Add <Delta, g> and |g|^2: nothing, where there is no gradient."""
        if gradient is not None:
            self._note_gradient(iterate, *self._kernels.products(delta, gradient))

    def add_position(self, iterate: Iterate, delta: Tensor, x: Tensor, gradient: Tensor | None) -> None:
        """Add <Delta, x> and |x|^2."""
        _note(self._position, iterate, *self._kernels.products(delta, x))

    def _note_gradient(self, iterate: Iterate, delta_grad: Tensor, grad_square: Tensor) -> None:
        ascends = iterate.group.get("maximize", False)
        _note(self._gradient, iterate, -delta_grad if ascends else delta_grad, grad_square)

    def total(self, like: Tensor) -> Tensor:
        """The sums, in the order of :class:`manic.tuner.Sums`: shape (4,), of ``like``'s dtype and device."""
        return torch.cat([_total(products, like) for products in (self._gradient, self._position)])


class Reduction:
    """The step's one collective: an asynchronous all_reduce of four numbers.

    Args:
        sums: From :meth:`PartialSums.total`.
        group: The process group, or ``None`` where one process holds everything.
        device: Where the group's backend wants its tensors.
    """

    def __init__(self, sums: Tensor, group: ProcessGroup | None, device: torch.device) -> None:
        self._home = sums.device
        self._sums = sums.to(device)
        self._work = None if group is None else dist.all_reduce(self._sums, group=group, async_op=True)

    def wait(self) -> Sums:
        """Return the global sums. On CUDA the stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
        return Sums(*self._sums.to(self._home).unbind())


# Pairs of products by the number of replicas, the dtype and the device: one after the other, to be added at the end.
_Products = dict[tuple[float, torch.dtype, torch.device], list[Tensor]]


def _note(products: _Products, iterate: Iterate, first: Tensor, second: Tensor) -> None:
    products.setdefault((iterate.replicas, first.dtype, first.device), []).extend((first, second))


def _total(products: _Products, like: Tensor) -> Tensor:
    total = like.new_zeros(2)
    for (replicas, _, _), values in products.items():
        total += torch.stack(values).to(like).view(-1, 2).sum(dim=0) / replicas
    return total
