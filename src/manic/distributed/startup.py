"""The ranks compare, once, what they hold and how they are set; if they differ, all raise the same error.

This is the only communication besides the step's all_reduce, and it takes place at the first step, after parameters
were added and after a load. It makes no choice for the user but one: how often FSDP1's shards are replicated.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from manic.distributed.collectives import from_every_rank, gather, raise_together
from manic.distributed.layout import Layout, check_gradient, is_fsdp1, local
from manic.step.chunks import pieces

__all__ = ["Agreement", "agree", "describe_group", "digest"]


class Agreement:
    """What the ranks have agreed on, so that they compare again only when it has changed.

    Args:
        layout: What they hold.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._identities: list[list[int]] | None = None

    def holds_for(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether these are the parameters that they have agreed on."""
        return self._identities == _identities(groups)

    def renew(
        self, groups: Sequence[Mapping[str, Any]], settings: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Compare; see :func:`agree` for arguments and errors."""
        agree(groups, settings, self._layout, device, dtype)
        self._identities = _identities(groups)


def _identities(groups: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    # By group: inside of ZeRO, a rank may be given a new group that is empty.
    return [[id(parameter) for parameter in group["params"]] for group in groups]


def agree(
    groups: Sequence[Mapping[str, Any]], settings: str, layout: Layout, device: torch.device, dtype: torch.dtype
) -> None:
    """Check over the group that all ranks hold what ``layout`` says, and run with the same settings.

    Args:
        groups: The optimizer's param groups.
        settings: Whatever else must be equal, in words.
        layout: Its ``fsdp1_replicas`` is set here.
        device: Where the group's backend takes tensors from.
        dtype: In which sums are compared: the tuner's.

    Raises:
        TypeError: on every rank alike, if any has a gradient that Mechanic cannot use.
        ValueError: on every rank alike, if settings, param groups, parameters, shapes, dtypes or placements differ
            between ranks that should hold the same, or if plain parameters that should be copies are not.
    """
    group = layout.group
    parameters = [parameter for each in groups for parameter in each["params"]]
    # torch's "fake" backend simulates the other ranks and moves no data (torchtitan's dry runs use it).
    simulated = group is not None and dist.get_backend(group) == "fake"
    raise_together(TypeError, _unusable_gradient(parameters), None if simulated else group, device)
    if group is None:
        return
    if dist.get_world_size(group) % layout.pipeline_stages:
        raise ValueError(
            f"pipeline_stages={layout.pipeline_stages} does not divide the process group's "
            f"{dist.get_world_size(group)} ranks"
        )
    if simulated:
        return
    common = f"{settings}, plain={layout.plain}, pipeline_stages={layout.pipeline_stages}"
    held = [
        text
        for each in groups
        for text in (describe_group(each), *(_describe(parameter, layout) for parameter in each["params"]))
        if text is not None
    ]

    rows = gather(torch.tensor([digest(common), digest("\n".join(held))], device=device), group)
    _compare([int(row[0]) for row in rows], 1, "settings", [common], group)
    _compare([int(row[1]) for row in rows], layout.pipeline_stages, "param groups or parameters", held, group)

    for parameter in parameters:
        layout.replicas(parameter)  # raises, alike on all ranks, if the group can't hold it evenly
    if layout.plain == "replicated":
        replicated = [p for p in parameters if not isinstance(p, DTensor) and not is_fsdp1(p)]
        _check_copies(replicated, layout.pipeline_stages, group, device, dtype)
        flattened = [p for p in parameters if is_fsdp1(p)]
        layout.fsdp1_replicas = _find_fsdp1_replicas(flattened, group, device, dtype)


def _unusable_gradient(parameters: Sequence[Tensor]) -> str:
    """What is wrong with the gradients, in words; empty: nothing."""
    for parameter in parameters:
        try:
            if parameter.grad is not None:
                check_gradient(parameter, parameter.grad)
        except TypeError as error:
            return str(error)
    return ""


def describe_group(group: Mapping[str, Any]) -> str:
    """What must be equal on all ranks about a param group's settings: those that are numbers, words or none."""
    settings = {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}
    return "a param group with " + ", ".join(f"{key}={settings[key]}" for key in sorted(settings) if settings[key])


def _plain(value: Any) -> str:
    """A setting in words; empty if it is an object, whose words may name an address."""
    if isinstance(value, Tensor):
        return repr(value.item()) if value.numel() == 1 else ""
    if isinstance(value, (list, tuple)):
        parts = [_plain(each) for each in value]
        return f"({', '.join(parts)})" if all(parts) else ""
    return repr(value) if value is None or isinstance(value, (bool, int, float, str)) else ""


def _describe(parameter: Tensor, layout: Layout) -> str | None:
    """What must be equal on all ranks of a stage about ``parameter``; ``None`` if nothing need be."""
    kind = f"{parameter.dtype}, {'trainable' if parameter.requires_grad else 'frozen'}"
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        return f"DTensor {tuple(parameter.shape)} {kind}, {parameter.placements} on a mesh {tuple(mesh.shape)}"
    if layout.plain == "sharded":
        return None
    if is_fsdp1(parameter):
        return f"FSDP1 {kind}"
    return f"{tuple(parameter.shape)} {kind}"


def digest(text: str) -> int:
    """A number of 56 bits that stands for ``text``."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _compare(digests: list[int], stages: int, what: str, mine: list[str], group: ProcessGroup) -> None:
    """Raise the same error everywhere unless each digest belongs to whole stages."""
    size = len(digests) // stages
    counts = Counter(digests)
    if all(count % size == 0 for count in counts.values()):
        return
    everyone = from_every_rank(mine, group)
    odd = min((each for each in counts if counts[each] % size), key=counts.__getitem__)
    other = digests.index(odd)
    reference = next(rank for rank, each in enumerate(digests) if each != odd)
    first, second = everyone[reference], everyone[other]
    index = next((i for i, pair in enumerate(zip(first, second)) if pair[0] != pair[1]), min(len(first), len(second)))

    def at(lines: list[str]) -> str:
        return f"{len(lines)}, number {index} being {lines[index] if index < len(lines) else 'missing'}"

    raise ValueError(
        f"ranks of the process group hold different {what}: rank {reference} has {at(first)}; rank {other} has "
        f"{at(second)}. Every rank must build the same model and optimizer, and load the same checkpoint. If each is "
        'to hold other plain parameters (ZeRO), pass plain="sharded", with the same param groups on all, empty where a '
        "rank owns nothing of one; if a pipeline splits the model, pass pipeline_stages; if these ranks do not train "
        "one model, pass their process_group"
    )


def _moments(parameters: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Element count, sum, sum of squares and whether elements differ, for each parameter: [n, 4]."""
    rows = []
    for parameter in parameters:
        x = local(parameter)
        row = torch.zeros(4, dtype=dtype, device=x.device)
        for (piece,) in pieces([x]):
            wide = piece.reshape(-1).to(dtype)
            row[0] += wide.numel()
            row[1] += wide.sum()
            row[2] += torch.dot(wide, wide)
            row[3] += (piece != x.reshape(-1)[0]).any()
        rows.append(row.to(device))
    return torch.stack(rows).nan_to_num() if rows else torch.zeros(0, 4, dtype=dtype, device=device)


def _check_copies(
    parameters: Sequence[Tensor], stages: int, group: ProcessGroup, device: torch.device, dtype: torch.dtype
) -> None:
    """Raise everywhere if parameters that should be copies of each other differ, or stages hold the same ones."""
    moments = _moments(parameters, device, dtype)
    if stages > 1:
        varied = bool((moments[:, 3] > 0).any())
        mine = torch.tensor([digest(str(moments.tolist())) if varied else 0], device=device)
        counts = Counter(int(row[0]) for row in gather(mine, group))
        size = dist.get_world_size(group) // stages
        if any(count != size for moment, count in counts.items() if moment):
            raise ValueError(
                f"pipeline_stages={stages} says that every plain parameter is on {size} rank(s) with the same values, "
                f"but some are on {sorted({count for moment, count in counts.items() if moment})}: stages must hold "
                "different parameters, and the ranks of a stage the same"
            )
        return
    every = torch.stack(gather(moments, group))[..., 1:3]
    spread = every.amax(dim=0) - every.amin(dim=0)
    # Copies are equal bit for bit; the margin is for ranks whose devices sum in another order.
    differs = (spread > 1e-6 * (every.abs().amax(dim=0) + 1e-12)).any(dim=-1)
    if differs.any():
        index = int(differs.nonzero()[0])
        raise ValueError(
            f"plain parameter {index} of shape {tuple(parameters[index].shape)} differs between the ranks of the "
            "process group, so it is no replica: if each rank holds another part of the model (ZeRO), pass "
            'plain="sharded"; if replicas were meant, start them equal (DistributedDataParallel does); if these ranks '
            "do not train one model, pass their process_group"
        )


def _find_fsdp1_replicas(
    parameters: Sequence[Tensor], group: ProcessGroup, device: torch.device, dtype: torch.dtype
) -> int:
    """How many ranks hold each FSDP1 shard: 1 for FULL_SHARD, the number of replicas for HYBRID_SHARD.

    FSDP1's parameters say nothing of their group, but ranks that hold one shard hold the same numbers.
    """
    if not parameters:
        return 1
    moments = torch.stack(gather(_moments(parameters, device, dtype), group))
    counts: set[int] = set()
    for column in moments.unbind(dim=1):
        varied = [tuple(row.tolist()) for row in column if row[3]]
        counts.update(Counter(varied).values())
    if len(counts) == 1 and dist.get_world_size(group) % max(counts) == 0:
        return counts.pop()
    raise ValueError(
        "cannot tell from the values of the FSDP1 parameters how often each shard is replicated: "
        + ("all are constant" if not counts else f"some parameters are held {sorted(counts)} times")
        + '. Pass plain="sharded" and process_group=<the FSDP sharding group>, over which the model is held once'
    )
