"""Inner products over the local shards, and the one all_reduce that makes them global.

It weighs each element by the number of ranks that hold it; it does not know what the sums are for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from manic.distributed.layout import local
from manic.step.capture import Capture
from manic.step.chunks import Scratch, pieces
from manic.step.kernels import inner_products

__all__ = ["DEFERRALS", "GRADIENTS", "PendingSums", "local_sums"]

GRADIENTS = "gradients"
"""Where nothing else is summed over gradients: 0 if all of them are finite, else not finite."""

DEFERRALS = "deferrals"
"""On how many ranks the host does not wait for this step's sums."""

# Which operands of a capture a sum multiplies; of a further reference, operands and sum have its number.
_OPERANDS = {
    "delta_grad": ("delta", "grad"),
    "grad_square": ("grad", "grad"),
    "delta_x": ("delta", "x"),
    "delta_square": ("delta", "delta"),
    "x_square": ("x", "x"),
    "update_square": ("update", "update"),
}
_LR = "lr"
_COUNTS = (GRADIENTS, DEFERRALS)


def _operands_of(name: str) -> tuple[str, str]:
    stem, _, number = name.rpartition("_")
    if not number.isdigit():
        return _OPERANDS[name]
    one, other = _OPERANDS[stem]
    return f"{one}_{number}", f"{other}_{number}"


def local_sums(
    captures: Iterable[Capture],
    names: Sequence[str],
    like: Tensor,
    *,
    checks_gradients: bool = False,
    grad_norm: float | Tensor | None = None,
    defers: bool = False,
    scales: int = 1,
    lrs: Sequence[float | Tensor | None] = (),
    place: tuple[int, int] | None = None,
    late: bool = False,
    exact: bool = False,
) -> Tensor:
    """This rank's share of the sums: an element that k ranks hold counts 1/k, and one of a sample 16 times.

    Args:
        captures: Of the plan.
        names: Of :func:`manic.tuners.base.early_sums`, or of ``LATE_SUMS``; and :data:`GRADIENTS`, :data:`DEFERRALS`.
        like: Has the dtype and the device of the sums.
        checks_gradients: Whether :data:`GRADIENTS`, or else ``"grad_square"``, is to be finite only if every gradient
            is, those outside of samples too. Ranks may hold different parameters, so it has no row of its own.
        grad_norm: What the caller knows of the gradients; they are not read for the check then.
        defers: Whether the host of this rank does not wait for them.
        scales: How many there are: a column for the sums over the shards of each.
        lrs: This rank's largest learning rate of each; ``None``: it has none.
        place: This rank and the number of ranks, where ranks may have different learning rates; ``None``: they have
            the same.
        late: Whether the base step was taken, so that captures show what it left.
        exact: Multiply in float64.

    Returns:
        In the order of ``names``, shape [len(names), scales]. If ``"lr"`` is among them, it comes last, with how many
        ranks it is of, shape [len(names) + 1, scales]; or, with a ``place``, in a row of its own for each rank.
    """
    wanted = [name for name in names if name != _LR]
    places = 2 if place is None else place[1]
    total = like.new_zeros(len(wanted) + places * (_LR in names), scales)
    if DEFERRALS in names:
        total[wanted.index(DEFERRALS)] = float(defers)
    if checks_gradients:
        check = total[wanted.index(GRADIENTS if GRADIENTS in names else "grad_square")]
        if grad_norm is None:
            _add_check(check, captures, GRADIENTS in names, exact)
        else:
            check[0] += 0.0 * (local(grad_norm).to(total).reshape(()) if isinstance(grad_norm, Tensor) else grad_norm)
    if any(name not in _COUNTS for name in wanted):
        _add_products(total, wanted, captures, late, exact)
    if _LR in names:
        _add_lrs(total[len(wanted) :], lrs, place)
    return total


def _add_products(total: Tensor, wanted: list[str], captures: Iterable[Capture], late: bool, exact: bool) -> None:
    """Add the products over the shards to the rows of their names, ``wanted``."""
    pairs = {name: _operands_of(name) for name in wanted if name not in _COUNTS}
    # By what is summed, the column, the weight, the dtype and the device: all products, to be added at the end.
    found: dict[tuple[tuple[str, ...], int, float, torch.dtype, torch.device], list[Tensor]] = {}
    scratch = Scratch()
    for capture in captures:
        if capture.first.is_frozen:
            continue
        ascends = capture.first.group.get("maximize", False)
        for operands in capture.after(scratch) if late else capture.before(scratch):
            here = tuple(name for name in pairs if operands.keys() >= set(pairs[name]))
            if not here:
                continue
            products = inner_products([pairs[name] for name in here], operands, exact=exact)
            if ascends:
                products = [-value if name.startswith("delta_grad") else value for name, value in zip(here, products)]
            # What the base step left is whole.
            weight = 1.0 / capture.first.replicas if late else capture.first.weight
            key = here, capture.first.column, weight, products[0].dtype, products[0].device
            found.setdefault(key, []).extend(products)
    for (here, column, weight, _, _), products in found.items():
        sums = torch.stack(products).to(total).view(-1, len(here)).sum(dim=0) * weight
        for name, value in zip(here, sums.unbind()):
            total[wanted.index(name), column] += value


def _add_lrs(rows: Tensor, lrs: Sequence[float | Tensor | None], place: tuple[int, int] | None) -> None:
    """Add this rank's learning rates to its row, or, where ranks share one, to the first, and their count to the last.

    Args:
        rows: The last ones of the sums.
        lrs: As of :func:`local_sums`.
        place: Likewise.
    """
    for column, lr in enumerate(lrs):
        if lr is None:
            continue
        rows[0 if place is None else place[0], column] += lr
        if place is None:
            rows[-1, column] += 1


def _add_check(row: Tensor, captures: Iterable[Capture], of_all: bool, exact: bool) -> None:
    """Add 0 to each scale's place if its gradients are finite, else nan; of those that are summed only if ``of_all``.

    A CPU reads fastest by inner products, other devices in one call over all tensors.
    """
    for capture in captures:
        gradients = list(capture.gradients() if of_all else capture.unread_gradients())
        if not gradients:
            continue
        if gradients[0].is_cpu or exact:
            columns = [gradients] if len(gradients) > 1 and not capture.first.is_sampled else [[g] for g in gradients]
            squares = [
                inner_products([("grad", "grad")], {"grad": piece}, exact=exact)[0]
                for column in columns
                for (piece,) in pieces(column)
            ]
        else:
            squares = list(torch._foreach_norm(gradients, 2.0, dtype=torch.float32))
        if squares:
            row[capture.first.column] += 0.0 * torch.stack(squares).sum()


class PendingSums:
    """The step's one collective: an asynchronous all_reduce of a few numbers.

    Args:
        sums: From :func:`local_sums`.
        names: What they are.
        shape: Of a sum over all ranks: ``()``, or [scales].
        group: The process group, or ``None`` where one process holds everything.
        device: Where the group's backend wants its tensors.
        lr_by_rank: Whether each rank's learning rate has an element of its own.
    """

    def __init__(
        self,
        sums: Tensor,
        names: Sequence[str],
        shape: tuple[int, ...],
        group: ProcessGroup | None,
        device: torch.device,
        *,
        lr_by_rank: bool = False,
    ) -> None:
        self._names, self._shape, self._home, self._lr_by_rank = names, shape, sums.device, lr_by_rank
        self._sums = sums.to(device)
        self._work = None if group is None else dist.all_reduce(self._sums, group=group, async_op=True)

    def wait(self) -> dict[str, Tensor]:
        """Return the global sums by name. On CUDA the stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
        values = list(self._sums.to(self._home).reshape(-1, *self._shape).unbind())
        names = [name for name in self._names if name != _LR]
        sums = dict(zip(names, values))
        if _LR in self._names and self._lr_by_rank:
            sums[_LR] = torch.stack(values[len(names) :]).amax(dim=0)  # a nan is the largest
        elif _LR in self._names:
            sums[_LR] = values[-2] / values[-1].clamp(min=1.0)
        return sums
