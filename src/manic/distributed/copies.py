"""Which ranks hold copies of a parameter, found by values where no placement tells.

A DTensor's placements tell of the ranks in its own mesh, and nothing of the others. Copies have equal values and
gradients: at the startup agreement each rank describes its shards by a few sums, and compares them with the others'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate

from manic.distributed.collectives import gather, raise_together
from manic.distributed.layout import (
    EXPERT_PARALLEL,
    Layout,
    is_expert_parallel,
    is_fsdp1,
    local_gradient,
    local_storage,
)
from manic.distributed.parts import plain_parts
from manic.optimizer.names import describe
from manic.step.chunks import pieces

__all__ = ["Copies"]

# Columns of a row: see _row.
_SIZE, _SUM, _SQUARE, _VARIES, _GRAD_SUM, _GRAD_SQUARE, _PLACE = range(7)
# The sum of squares of a gradient that is not finite, which tells nothing.
_UNKNOWN = -1.0
# Copies are equal bit for bit; the margin is for devices that sum in different orders.
_VALUES = 1e-6
# Those of gradients, which may be of low precision, are summed in different orders, too.
_GRADIENTS = 1e-3


class Copies:
    """The parameters of this rank of which other ranks may hold copies that no placement shows.

    Args:
        groups: The param groups.
        layout: The placement of the model.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], layout: Layout) -> None:
        self._groups, self._layout = groups, layout
        self._plain: list[Tensor] = []
        self._outside: list[Tensor] = []
        self._declared: list[Tensor] = []
        self._fsdp1: list[Tensor] = []
        for group in groups:
            for parameter in group["params"]:
                if not isinstance(parameter, DTensor) and layout.plain == "sharded":
                    continue
                if is_expert_parallel(group):
                    self._declared.append(parameter)
                elif is_fsdp1(parameter):
                    self._fsdp1.append(parameter)
                elif not isinstance(parameter, DTensor):
                    self._plain.append(parameter)
                elif layout.has_copies_outside(parameter):
                    self._outside.append(parameter)

    @property
    def numbers(self) -> list[int]:
        """How many there are: plain replicas, DTensors on part of the ranks, expert-parallel parameters, FSDP1's."""
        return [len(self._plain), len(self._outside), len(self._declared), len(self._fsdp1)]

    def compare(
        self,
        numbers: Sequence[int],
        looks: Sequence[int],
        group: ProcessGroup,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Confirm assumed copies, and count the others; the layout takes the counts.

        Args:
            numbers: The largest :attr:`numbers` of any rank.
            looks: By rank, what is equal on ranks that hold parameters of the same description.
            group: The process group.
            device: A device that its backend supports.
            dtype: The dtype of compared sums.

        Raises:
            ValueError: on every rank, if assumed copies differ, or copies cannot be counted.
        """
        if not any(numbers):
            return
        blocks = [
            _padded([_row(parameter, dtype) for parameter in block], number, device, dtype)
            for block, number in zip((self._plain, self._outside, self._declared, self._fsdp1), numbers)
        ]
        every = torch.stack(gather(torch.cat(blocks), group)).nan_to_num()
        plain, outside, declared, fsdp1 = torch.split(every, list(numbers), dim=1)
        seen = _Seen(dist.get_rank(group), torch.tensor(list(looks), device="cpu"))
        counts, problem = self._counts(declared, seen)
        problem = (
            self._difference(self._plain, plain, seen) or self._difference(self._outside, outside, seen) or problem
        )
        raise_together(ValueError, problem, group, device)
        _check_stages(plain, self._layout.pipeline_stages)
        self._layout.counted = counts
        self._layout.fsdp1_replicas = _fsdp1_replicas(fsdp1) if numbers[3] else 1

    def _difference(self, parameters: Sequence[Tensor], rows: Tensor, seen: _Seen) -> str:
        """The first parameter of which another rank should hold a copy and does not, in words; empty: none."""
        for index, parameter in enumerate(parameters):
            # Stages of a pipeline that look alike may have equal values; the number is a multiple then.
            expected = int(self._layout.replicas(parameter))
            alike, values_alike = seen.copies(rows[:, index]), seen.copies(rows[:, index], with_gradients=False)
            if int(alike.sum()) % expected == 0:
                continue
            what = "differs" if int(values_alike.sum()) % expected else "has another gradient"
            name = describe(parameter, self._groups)
            declare = f'give it a param group with "{EXPERT_PARALLEL}": True if ranks hold different experts'
            if isinstance(parameter, DTensor):
                return (
                    f"{name} is on the ranks {parameter.device_mesh.mesh.flatten().tolist()} alone, so the other ranks "
                    f"of its pipeline stage should hold copies, but it {what} there: {declare}, set pipeline_stages "
                    "and process_group to those of the model, or make the copies equal"
                )
            advice = (
                "if it should be replicated, initialize it equally (DistributedDataParallel does)"
                if what == "differs"
                else "if it should be replicated, average its gradient over the ranks (DistributedDataParallel does)"
            )
            return (
                f"{name}, a plain tensor, {what} on other ranks of the process group, so it is not replicated: if each "
                f'rank holds another part of the model (ZeRO), pass plain="sharded"; {advice}; {declare}; if these '
                "ranks do not train one model, pass their process_group"
            )
        return ""

    def _counts(self, rows: Tensor, seen: _Seen) -> tuple[dict[int, float], str]:
        """How many ranks hold each expert-parallel parameter, by its ``id``; or why this cannot be known, in words.

        Different experts may start from equal values, constant biases or copies of one dense layer. So equal values
        count as copies if gradients confirm it, or another parameter of the kind has so many copies.
        """
        counts: dict[int, float] = {}
        open_: list[int] = []
        of_kind: dict[Any, set[int]] = {}
        for index, parameter in enumerate(self._declared):
            row = rows[seen.rank, index]
            equal = int(seen.copies(rows[:, index], with_gradients=False).sum())
            if row[_SIZE] == 0:
                counts[id(parameter)] = 1.0
            elif row[_VARIES] and (equal == 1 or row[_GRAD_SQUARE] > 0):
                counts[id(parameter)] = float(seen.copies(rows[:, index]).sum())
                of_kind.setdefault(_kind(parameter), set()).add(int(counts[id(parameter)]))
            else:
                open_.append(index)
        for index in open_:
            parameter, column = self._declared[index], rows[:, index]
            equal_on = seen.copies(column, with_gradients=False).nonzero().flatten().tolist()
            confirmed = {int(seen.copies(column, rank).sum()) for rank in equal_on if column[rank, _GRAD_SQUARE] > 0}
            found = of_kind.get(_kind(parameter), set())
            if len(found) != 1:
                found = confirmed or ({len(equal_on)} if column[seen.rank, _VARIES] else set())
            if len(found) != 1:
                name = describe(parameter, self._groups)
                return {}, (
                    f"cannot count by its values how many ranks hold the expert-parallel {name}"
                    ": it is constant or equal on several ranks, has no gradient that tells more, and no parameter of "
                    "its kind does. Initialize experts differently, or take the first step with gradients"
                )
            (count,) = found
            counts[id(parameter)] = float(count)
        return counts, ""


class _Seen:
    """Compares rows of all ranks with one rank's.

    Args:
        rank: This rank in the group.
        looks: By rank, what is equal where parameters have the same description.
    """

    def __init__(self, rank: int, looks: Tensor) -> None:
        self.rank, self._looks = rank, looks

    def copies(self, column: Tensor, rank: int | None = None, *, with_gradients: bool = True) -> Tensor:
        """Which ranks hold a copy of what ``rank`` holds, by default this one.

        Args:
            column: A parameter's row of each rank, shape [ranks, columns].
            rank: Whose copies.
            with_gradients: Whether gradients must be equal, too.

        Returns:
            Booleans, shape [ranks].
        """
        rank = self.rank if rank is None else rank
        row = column[rank]
        found = (self._looks == self._looks[rank]) & (column[:, [_PLACE, _SIZE]] == row[[_PLACE, _SIZE]]).all(dim=1)
        found &= _are_close(column[:, _SUM], column[:, _SQUARE], row[_SUM], row[_SQUARE], _VALUES)
        if with_gradients:
            sums, squares = column[:, _GRAD_SUM], column[:, _GRAD_SQUARE]
            are_close = _are_close(sums, squares, row[_GRAD_SUM], row[_GRAD_SQUARE], _GRADIENTS)
            found &= are_close | (squares == _UNKNOWN) | (row[_GRAD_SQUARE] == _UNKNOWN)
        return found


def _are_close(sums: Tensor, squares: Tensor, sum_: Tensor, square: Tensor, tolerance: float) -> Tensor:
    """Whether moments are equal up to rounding: where elements cancel, a sum is small beside their norm."""
    largest = torch.maximum(squares, square)
    return ((sums - sum_).abs() <= tolerance * largest.sqrt()) & ((squares - square).abs() <= tolerance * largest)


def _row(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Describe the local shard: number of elements, sum, sum of squares, whether elements differ; sum and sum of
    squares of the gradient, 0 without one; and which of the shards it is by its placements. Shape [7]."""
    gradient = local_gradient(parameter)
    row = torch.zeros(7, dtype=dtype, device=local_storage(parameter).device)
    for x in plain_parts(parameter):
        row[_SIZE] += x.numel()
        row[_SUM : _SQUARE + 1] += _moments(x, dtype)
        if x.numel():
            varies = torch.stack([(piece != x.reshape(-1)[0]).any() for (piece,) in pieces([x])]).any()
            row[_VARIES] = torch.maximum(row[_VARIES], varies.to(dtype))
    if gradient is not None:
        moments = _moments(gradient, dtype)
        row[_GRAD_SUM], row[_GRAD_SQUARE] = torch.where(moments.isfinite().all(), moments, _UNKNOWN)
    row[_PLACE] = _place(parameter)
    return row


def _moments(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A sum and the sum of squares: shape [2]. Weights tell a permutation, and average out what all elements share."""
    moments, start = torch.zeros(2, dtype=dtype, device=x.device), 0
    for (piece,) in pieces([x]):
        wide = piece.reshape(-1).to(dtype)
        weights = torch.arange(start, start + wide.numel(), dtype=dtype, device=x.device).cos()
        moments[0] += torch.dot(wide, weights)
        moments[1] += torch.dot(wide, wide)
        start += wide.numel()
    return moments


def _place(parameter: Tensor) -> int:
    """A number of this rank's coordinates in the parameter's mesh, along the dimensions that split it."""
    if not isinstance(parameter, DTensor):
        return 0
    mesh = parameter.device_mesh
    coordinate: Sequence[int] = mesh.get_coordinate() or ()
    place = 0
    for index, size, placement in zip(coordinate, mesh.shape, parameter.placements):
        if not isinstance(placement, Replicate):
            place = place * size + index
    return place


def _kind(parameter: Tensor) -> Any:
    """What parameters have in common that are held equally often."""
    if isinstance(parameter, DTensor):
        return tuple(parameter.device_mesh.shape), parameter.placements
    return is_fsdp1(parameter)


def _padded(rows: list[Tensor], number: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Stacked, with rows of no rank's parameters up to ``number``: other stages of a pipeline may have more."""
    missing = torch.full((number - len(rows), 7), -1.0, dtype=dtype, device=device)
    return torch.cat((torch.stack([row.to(device) for row in rows]), missing)) if rows else missing


def _check_stages(rows: Tensor, stages: int) -> None:
    """Raise ValueError if the plain parameters of two pipeline stages are equal."""
    varied = rows[(rows[..., _VARIES] > 0).any(dim=1)]
    if stages == 1 or not len(varied):
        return
    size = len(rows) // stages
    held = int(torch.unique(varied[..., : _VARIES + 1].flatten(1), dim=0, return_counts=True)[1].max())
    if held > size:
        raise ValueError(
            f"pipeline_stages={stages} requires every plain parameter on {size} rank(s), but some are on {held} with "
            "the same values: stages must hold different parameters"
        )


def _fsdp1_replicas(rows: Tensor) -> int:
    """Number of ranks that hold each FSDP1 shard: 1 for FULL_SHARD, the number of replicas for HYBRID_SHARD.

    FSDP1's parameters do not expose their group, but ranks that hold the same shard hold the same values.
    """
    counts: set[int] = set()
    for column in rows.unbind(dim=1):
        varied = [tuple(row[: _VARIES + 1].tolist()) for row in column if row[_VARIES] > 0]
        counts.update(Counter(varied).values())
    if len(counts) == 1 and len(rows) % max(counts) == 0:
        return counts.pop()
    raise ValueError(
        "cannot infer from the values of the FSDP1 parameters how often each shard is replicated: "
        + ("all are constant" if not counts else f"some parameters are held {sorted(counts)} times")
        + '. Pass plain="sharded" and process_group=<the FSDP sharding group>, which holds the model once'
    )
