"""Detection of replicas that are no longer equal bit for bit, in the middle of a run.

Compares digests over the process group, and names the first rank and tensor that differ. layout.py decides which ranks
hold replicas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from manic.distributed.collectives import from_every_rank, gather
from manic.distributed.layout import Layout, is_expert_parallel
from manic.distributed.parts import plain_parts
from manic.distributed.startup import describe_group, digest
from manic.optimizer.names import describe
from manic.step.chunks import pieces

__all__ = ["raise_if_drifted"]

Held = tuple[Tensor, str, Tensor]
"""A parameter, the name of one of its tensors, and that tensor, with the parameter's shape and placements."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Knuth's multiplicative hashing for 64 bits. Odd, so that a product loses no bit.
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)


def raise_if_drifted(
    tuner: Tensor,
    scale: Tensor,
    groups: Sequence[Mapping[str, Any]],
    held: Sequence[Held],
    layout: Layout,
    device: torch.device,
) -> None:
    """Raise the same error on every rank if replicas differ.

    Args:
        tuner: The tuner's state, equal on all ranks.
        scale: S, for the message.
        groups: The param groups; their settings are equal on all ranks of a pipeline stage.
        held: The parameters' tensors to compare, in the same order on all ranks of a stage.
        layout: The number of replicas of each parameter.
        device: A device that the group's backend supports.

    Raises:
        RuntimeError: if replicas differ; the message names the first difference.
    """
    if layout.group is not None and (found := _difference(tuner, scale, groups, held, layout, device)):
        raise RuntimeError(
            f"ranks have drifted apart: {found}. Load an earlier checkpoint, and find what changes parameters or "
            "settings on one rank alone"
        )


def _difference(
    tuner: Tensor,
    scale: Tensor,
    groups: Sequence[Mapping[str, Any]],
    held: Sequence[Held],
    layout: Layout,
    device: torch.device,
) -> str:
    group = layout.group
    assert group is not None
    settings = "\n".join(describe_group(each) for each in groups)
    row = torch.tensor([digest(str(tuner.tolist())), digest(settings)], device=device)
    rows = torch.stack(gather(row, group))
    if found := _odd_one(rows[:, 0].tolist(), len(rows)):
        scales = from_every_rank(scale.tolist(), group)
        rank, other = found
        return f"the tuner of rank {rank} differs from rank {other}: S is {scales[rank]!r} and {scales[other]!r}"
    if found := _odd_one(rows[:, 1].tolist(), len(rows) // layout.pipeline_stages):
        lines = from_every_rank(settings, group)
        rank, other = found
        return f"the settings of rank {rank} differ from rank {other}: {lines[rank]} and {lines[other]}"
    return _tensors(held, groups, layout, group, device)


def _tensors(
    held: Sequence[Held],
    groups: Sequence[Mapping[str, Any]],
    layout: Layout,
    group: ProcessGroup,
    device: torch.device,
) -> str:
    experts = {id(parameter) for each in groups if is_expert_parallel(each) for parameter in each["params"]}
    mine = torch.zeros(len(held), 2, dtype=torch.int64, device=device)
    for index, (parameter, _, tensor) in enumerate(held):
        mine[index, 0] = _digest_of(tensor).to(device)
        is_declared = id(parameter) in experts
        mine[index, 1] = int(layout.replicas(parameter, is_declared=is_declared)) * (-1 if is_declared else 1)
    longest = max(int(size) for size in gather(torch.tensor(len(held), device=device), group))
    every = torch.stack(gather(torch.cat((mine, mine.new_zeros(longest - len(held), 2))), group)).tolist()
    numbers = {number for rows in every for _, number in rows} - {-1, 0, 1}
    # Pipeline stages may hold different tensors at an index, or none. Copies of a declared one may have another index,
    # for ranks may have different numbers of them.
    sets = [[(rank, index) for rank in range(len(every))] for index in range(longest)]
    anywhere = [each for column in sets for each in column]
    for copies in sorted(numbers, reverse=True):
        for places in sets if copies > 0 else [anywhere]:
            chosen = [(rank, index) for rank, index in places if every[rank][index][1] == copies]
            if found := _odd_one([every[rank][index][0] for rank, index in chosen], abs(copies)):
                (rank, index), (other, _) = (chosen[each] for each in found)
                names = from_every_rank(
                    [f"{name} of {describe(parameter, groups)}" for parameter, name, _ in held], group
                )
                return f"{names[rank][index]} on rank {rank} differs from rank {other}"
    return ""


def _odd_one(values: Sequence[int], copies: int) -> tuple[int, int] | None:
    """Indices of a value whose count is not a multiple of ``copies``, and of one to compare it with; else ``None``."""
    counts = Counter(values)
    odd = sorted((value for value, count in counts.items() if count % copies), key=lambda value: counts[value])
    if not odd:
        return None
    rarest, *others = odd
    reference = others[-1] if others else next((value for value in values if value != rarest), rarest)
    return values.index(rarest), values.index(reference)


def _digest_of(tensor: Tensor) -> Tensor:
    """A 0-dim int64 digest of this rank's bits of ``tensor``: a sum of words, each times an odd number of its index."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    start = 0
    for part in plain_parts(tensor):
        for (piece,) in pieces([part]):
            words = piece.reshape(-1).view(_INTEGERS[piece.element_size()]).to(torch.int64)
            places = torch.arange(start, start + words.numel(), device=words.device)
            total += (words * (2 * (places * _MULTIPLIER) + 1)).sum()
            start += words.numel()
    return total
