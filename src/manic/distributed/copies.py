"""Which ranks hold copies of a parameter, found by values where no placement tells.

A DTensor's placements tell of the ranks in its own mesh, and nothing of the others. Copies have equal values and
gradients: at the startup agreement each rank describes its shards by a few sums, and compares them with the others'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from manic.distributed.collectives import gather, raise_together
from manic.distributed.layout import EXPERT_PARALLEL, Layout, is_expert_parallel, is_fsdp1
from manic.distributed.rows import SIZE, TOLERANCE, VARIES, Seen, padded, row_of
from manic.optimizer.names import describe

__all__ = ["Copies"]


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
        self._of_stage: list[Tensor] = []
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
                elif layout.pipeline_stages > 1:
                    self._of_stage.append(parameter)

    @property
    def numbers(self) -> list[int]:
        """How many there are: plain replicas, DTensors on part of the ranks of a pipeline stage, expert-parallel
        parameters, FSDP1's, other DTensors of a pipeline stage."""
        return [len(block) for block in self._blocks]

    @property
    def _blocks(self) -> tuple[list[Tensor], ...]:
        return self._plain, self._outside, self._declared, self._fsdp1, self._of_stage

    def compare(
        self,
        numbers: Sequence[int],
        descriptions: Sequence[int],
        group: ProcessGroup,
        device: torch.device,
        dtype: torch.dtype,
        unconfirmed: Container[int] | None = None,
    ) -> set[int]:
        """Confirm assumed copies, and count the others; the layout takes the counts.

        Args:
            numbers: The largest :attr:`numbers` of any rank.
            descriptions: By rank, what is equal on ranks that hold parameters of the same description.
            group: The process group.
            device: A device that its backend supports.
            dtype: The dtype of compared sums.
            unconfirmed: The result of an earlier comparison: only these are counted again. ``None``: compare all.

        Returns:
            The ``id`` of each expert-parallel parameter of this rank that has a count which no gradient confirms yet.

        Raises:
            ValueError: on every rank, if assumed copies differ, or copies cannot be counted.
        """
        if not any(numbers):
            return set()
        blocks = [
            padded([row_of(parameter, dtype) for parameter in block], number, device, dtype)
            for block, number in zip(self._blocks, numbers)
        ]
        every = torch.stack(gather(torch.cat(blocks), group)).nan_to_num()
        plain, outside, declared, fsdp1, of_stage = torch.split(every, list(numbers), dim=1)
        seen = Seen(dist.get_rank(group), torch.tensor(list(descriptions), device="cpu"), every)
        counts, still_open, problem = self._counts(declared, seen, unconfirmed)
        if unconfirmed is None:
            problem = (
                self._difference(self._plain, plain, seen) or self._difference(self._outside, outside, seen) or problem
            )
        raise_together(ValueError, problem, group, device)
        if unconfirmed is None:
            _check_stages(plain, self._layout.pipeline_stages)
            shared = self._shared([*self._plain, *self._outside, *self._of_stage], (plain, outside, of_stage), seen)
            raise_together(ValueError, shared, group, device)
            self._layout.fsdp1_replicas = _fsdp1_replicas(fsdp1) if numbers[3] else 1
        self._layout.counted = counts
        return still_open

    def _difference(self, parameters: Sequence[Tensor], rows: Tensor, seen: Seen) -> str:
        """The first parameter of which another rank should hold a copy and does not, in words; empty: none."""
        for index, parameter in enumerate(parameters):
            # Constants, like biases of zeros, are equal in pipeline stages of the same description: these are not told
            # apart here, and the number is a multiple of that of one stage then.
            expected = int(self._layout.replicas(parameter))
            column = rows[:, index : index + 1]
            row = column[seen.rank, 0]
            alike, values_alike = seen.copies(column, row), seen.copies(column, row, with_gradients=False)
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
            if not parameter.requires_grad:
                declare = f"leave frozen parameters that differ between ranks out of the optimizer; {declare}"
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

    def _shared(self, parameters: Sequence[Tensor], blocks: Sequence[Tensor], seen: Seen) -> str:
        """The first parameter that another pipeline stage holds, too, in words; empty: none.

        Stages may be initialized alike. So a parameter is shared if its gradients are equal, too.
        """
        stages = self._layout.pipeline_stages
        if stages == 1:
            return ""
        rows = torch.cat(list(blocks), dim=1)
        mine = rows[seen.rank][rows[seen.rank, :, SIZE] >= 0]
        for parameter, row in zip(parameters, mine):
            expected = int(self._layout.replicas(parameter))
            if not row[VARIES] or not seen.tells(row):
                continue
            held = int(seen.copies(rows, row, in_stage=False).sum())
            if held > expected:
                return (
                    f"pipeline_stages={stages} requires stages to hold different parameters, but "
                    f"{describe(parameter, self._groups)}, expected on {expected} rank(s), is on {held} with the same "
                    "values and gradients. If stages share it, such as a tied embedding, give it a param group with "
                    f'"{EXPERT_PARALLEL}": True in each of them, which counts its copies'
                )
        return ""

    def _counts(
        self, rows: Tensor, seen: Seen, unconfirmed: Container[int] | None
    ) -> tuple[dict[int, float], set[int], str]:
        """How many ranks hold each expert-parallel parameter, by its ``id``; those that no gradient confirms; and why
        one cannot be counted, in words.

        Different experts may start from equal values, constant biases or copies of one dense layer. So equal values
        count as copies if gradients confirm it, or another parameter of the kind has so many copies. Ranks may have
        different numbers of experts, so a copy may have another index.
        """
        counts: dict[int, float] = {}
        open_: list[int] = []
        of_kind: dict[Any, set[int]] = {}
        for index, parameter in enumerate(self._declared):
            row = rows[seen.rank, index]
            if unconfirmed is not None and id(parameter) not in unconfirmed:
                count = self._layout.counted[id(parameter)]
            elif seen.tells(row):
                count = float(seen.copies(rows, row, in_stage=False).sum())
            elif row[SIZE] == 0 or (row[VARIES] and len(seen.equal(rows, row)) == 1):
                count = 1.0
            else:
                open_.append(index)
                continue
            counts[id(parameter)] = count
            if row[SIZE]:
                of_kind.setdefault(_kind(parameter), set()).add(int(count))
        still_open: set[int] = set()
        for index in open_:
            parameter, row = self._declared[index], rows[seen.rank, index]
            confirmed = seen.confirmed(rows[:, index : index + 1], row, rows) or seen.confirmed(rows, row, rows)
            known = of_kind.get(_kind(parameter), set())
            found = confirmed if not known or confirmed & known else confirmed | known
            if not found and row[VARIES]:
                found = {len(seen.equal(rows, row))}
            if len(found) != 1:
                problem = (
                    "cannot count by its values how many ranks hold the expert-parallel "
                    f"{describe(parameter, self._groups)}: it is constant or equal on several ranks, has no gradient "
                    "that tells more, and parameters like it do not tell either. Initialize experts differently, take "
                    "the first step with gradients, or give parameters that are on all ranks a param group of their "
                    "own, without the declaration"
                )
                return {}, set(), problem
            (count,) = found
            counts[id(parameter)] = float(count)
            if not confirmed and parameter.requires_grad:
                still_open.add(id(parameter))
        return counts, still_open, ""


def _kind(parameter: Tensor) -> Any:
    """What parameters have in common that are held equally often."""
    if isinstance(parameter, DTensor):
        return tuple(parameter.device_mesh.shape), parameter.placements
    return is_fsdp1(parameter)


def _check_stages(rows: Tensor, stages: int) -> None:
    """Raise ValueError if the plain parameters of two pipeline stages are equal."""
    varied = rows[(rows[..., VARIES] > 0).any(dim=1)]
    if stages == 1 or not len(varied):
        return
    size = len(rows) // stages
    held = int(torch.unique(varied[..., :TOLERANCE].flatten(1), dim=0, return_counts=True)[1].max())
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
        varied = [tuple(row[:TOLERANCE].tolist()) for row in column if row[VARIES] > 0]
        counts.update(Counter(varied).values())
    if len(counts) == 1 and len(rows) % max(counts) == 0:
        return counts.pop()
    raise ValueError(
        "cannot infer from the values of the FSDP1 parameters how often each shard is replicated: "
        + ("all are constant" if not counts else f"some parameters are held {sorted(counts)} times")
        + '. Pass plain="sharded" and process_group=<the FSDP sharding group>, which holds the model once'
    )
