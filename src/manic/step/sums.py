"""Partial sums over the local shards, and the one all_reduce that makes them global.

It reads iterates and weighs each by its number of replicas; it does not know what the sums are for.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from manic.step.capture import Iterate
from manic.step.kernels import Kernels
from manic.tuners.base import Sums

__all__ = ["PartialSums", "Reduction"]


class PartialSums:
    """This rank's share of the four inner products: an element that k ranks hold counts 1/k.

    Its methods are what :func:`manic.step.capture.stepping` and :func:`manic.step.capture.show` show pieces to.

    Args:
        kernels: How pieces are summed.
        squares: Whether |Delta|^2 is wanted in the place of <Delta, x>.
    """

    def __init__(self, kernels: Kernels, squares: bool = False) -> None:
        self._kernels, self._squares = kernels, squares
        self._gradient: _Products = {}
        self._position: _Products = {}

    def add(self, iterate: Iterate, delta: Tensor, x: Tensor, gradient: Tensor | None) -> None:
        """Add all four."""
        if gradient is None or self._squares:
            self.add_gradient(iterate, delta, x, gradient)
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
        """Add <Delta, x>, or |Delta|^2, and |x|^2."""
        products = self._kernels.squares if self._squares else self._kernels.products
        _note(self._position, iterate, *products(delta, x))

    def _note_gradient(self, iterate: Iterate, delta_grad: Tensor, grad_square: Tensor) -> None:
        ascends = iterate.group.get("maximize", False)
        _note(self._gradient, iterate, -delta_grad if ascends else delta_grad, grad_square)

    def total(self, like: Tensor, lr: float | Tensor | None = None) -> Tensor:
        """The sums, in the order of :class:`manic.tuners.base.Sums`: shape (4,), or (6,) with squares.

        Args:
            like: Has the dtype and the device.
            lr: With squares, this rank's learning rate, which is followed by how many ranks it is of; ``None``: none.
        """
        totals = [_total(products, like) for products in (self._gradient, self._position)]
        if self._squares:
            known = like.new_zeros(2)
            if lr is not None:
                known[:1] += lr
                known[1:] += 1
            totals.append(known)
        return torch.cat(totals)


class Reduction:
    """The step's one collective: an asynchronous all_reduce of four numbers, or six.

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
        sums = self._sums.to(self._home)
        lr = sums[4] / sums[5].clamp(min=1.0) if sums.numel() > 4 else torch.ones_like(sums[0])
        delta_grad, grad_square, delta_dot, x_square = sums[:4].unbind()
        return Sums(delta_grad, grad_square, delta_dot, x_square, lr)


# Pairs of products by the number of replicas, the dtype and the device: one after the other, to be added at the end.
_Products = dict[tuple[float, torch.dtype, torch.device], list[Tensor]]


def _note(products: _Products, iterate: Iterate, first: Tensor, second: Tensor) -> None:
    products.setdefault((iterate.replicas, first.dtype, first.device), []).extend((first, second))


def _total(products: _Products, like: Tensor) -> Tensor:
    total = like.new_zeros(2)
    for (replicas, _, _), values in products.items():
        total += torch.stack(values).to(like).view(-1, 2).sum(dim=0) / replicas
    return total
