"""Startup check: ranks compare their parameters and settings; if they differ, all raise the same error.

Runs at the first step, after parameters were added and after a load; other steps do not compare ranks unless the
drift check does. It infers only one setting: how often FSDP1's shards are replicated.
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
from manic.distributed.layout import Layout, check_gradient, is_fsdp1
from manic.distributed.parts import plain_parts
from manic.step.chunks import pieces

__all__ = ["Agreement", "agree", "describe_group", "digest"]


class Agreement:
    """Remembers the parameters that the ranks have compared, so that they compare again only after a change.

    Args:
        layout: The placement of the model over the ranks.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._identities: list[list[int]] | None = None

    def holds_for(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the ranks have compared exactly these parameters."""
        return self._identities == _identities(groups)

    def forget(self) -> None:
        """Compare again before the next step."""
        self._identities = None

    def renew(
        self, groups: Sequence[Mapping[str, Any]], settings: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Compare again; see :func:`agree` for arguments and errors."""
        agree(groups, settings, self._layout, device, dtype)
        self._identities = _identities(groups)


def _identities(groups: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    # By group: inside ZeRO, a rank's part of a new group may be empty.
    return [[id(parameter) for parameter in group["params"]] for group in groups]


def agree(
    groups: Sequence[Mapping[str, Any]], settings: str, layout: Layout, device: torch.device, dtype: torch.dtype
) -> None:
    """Check over the group that all ranks hold what ``layout`` declares and have the same settings.

    Args:
        groups: The optimizer's param groups.
        settings: Further settings that must be equal, in words.
        layout: The placement of the model; this function sets its ``fsdp1_replicas``.
        device: A device that the group's backend supports.
        dtype: The dtype of compared sums: the tuner's.

    Raises:
        TypeError: on every rank, if any rank has a gradient that Mechanic cannot use.
        ValueError: on every rank, if settings, param groups, parameters, shapes, dtypes or placements differ between
            ranks of a stage, or if plain parameters that should be replicas differ.
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
        layout.replicas(parameter)  # raises on all ranks if the group does not hold it evenly
    if layout.plain == "replicated":
        replicated = [p for p in parameters if not isinstance(p, DTensor) and not is_fsdp1(p)]
        _check_replicas(replicated, layout.pipeline_stages, group, device, dtype)
        flattened = [p for p in parameters if is_fsdp1(p)]
        layout.fsdp1_replicas = _find_fsdp1_replicas(flattened, group, device, dtype)


def _unusable_gradient(parameters: Sequence[Tensor]) -> str:
    """The first gradient that Mechanic cannot use, in words; empty: none."""
    for parameter in parameters:
        try:
            if parameter.grad is not None:
                check_gradient(parameter, parameter.grad)
        except TypeError as error:
            return str(error)
    return ""


def describe_group(group: Mapping[str, Any]) -> str:
    """The param group's settings that must be equal on all ranks: numbers, strings and ``None``."""
    settings = {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}
    return "a param group with " + ", ".join(f"{key}={settings[key]}" for key in sorted(settings) if settings[key])


def _plain(value: Any) -> str:
    """A setting in words; empty for an object, whose ``repr`` may contain an address."""
    if isinstance(value, Tensor):
        return repr(value.item()) if value.numel() == 1 else ""
    if isinstance(value, (list, tuple)):
        parts = [_plain(each) for each in value]
        return f"({', '.join(parts)})" if all(parts) else ""
    return repr(value) if value is None or isinstance(value, (bool, int, float, str)) else ""


def _describe(parameter: Tensor, layout: Layout) -> str | None:
    """The properties of ``parameter`` that must be equal on all ranks of a stage; ``None`` if there are none."""
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
    """A 56-bit digest of ``text``."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _compare(digests: list[int], stages: int, what: str, mine: list[str], group: ProcessGroup) -> None:
    """Raise the same error on every rank unless the count of each digest is a multiple of the stage size."""
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
        return f"{len(lines)}, number {index} is {lines[index] if index < len(lines) else 'missing'}"

    raise ValueError(
        f"ranks of the process group hold different {what}: rank {reference} has {at(first)}; rank {other} has "
        f"{at(second)}. Every rank must build the same model and optimizer, and load the same checkpoint. If ranks "
        'hold different plain parameters (ZeRO), pass plain="sharded", with the same param groups on all ranks (a '
        "rank's group may be empty); if a pipeline splits the model, pass pipeline_stages; if these ranks do not train "
        "one model, pass their process_group"
    )


def _moments(parameters: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Element count, sum, sum of squares and whether elements differ, for each parameter: [n, 4]."""
    rows = []
    for parameter in parameters:
        row = torch.zeros(4, dtype=dtype, device=parameter.device)
        for x in plain_parts(parameter):
            for (piece,) in pieces([x]):
                wide = piece.reshape(-1).to(dtype)
                row[0] += wide.numel()
                row[1] += wide.sum()
                row[2] += torch.dot(wide, wide)
                row[3] += (piece != x.reshape(-1)[0]).any()
        rows.append(row.to(device))
    return torch.stack(rows).nan_to_num() if rows else torch.zeros(0, 4, dtype=dtype, device=device)


def _check_replicas(
    parameters: Sequence[Tensor], stages: int, group: ProcessGroup, device: torch.device, dtype: torch.dtype
) -> None:
    """Raise on every rank if replicas differ, or if stages hold the same parameters."""
    moments = _moments(parameters, device, dtype)
    if stages > 1:
        varied = bool((moments[:, 3] > 0).any())
        mine = torch.tensor([digest(str(moments.tolist())) if varied else 0], device=device)
        counts = Counter(int(row[0]) for row in gather(mine, group))
        size = dist.get_world_size(group) // stages
        if any(count != size for moment, count in counts.items() if moment):
            raise ValueError(
                f"pipeline_stages={stages} requires every plain parameter on {size} rank(s) with the same values, but "
                f"some are on {sorted({count for moment, count in counts.items() if moment})}: stages must hold "
                "different parameters, and the ranks of a stage the same"
            )
        return
    every = torch.stack(gather(moments, group))[..., 1:3]
    spread = every.amax(dim=0) - every.amin(dim=0)
    # Replicas are equal bit for bit; the margin is for devices that sum in different orders.
    differs = (spread > 1e-6 * (every.abs().amax(dim=0) + 1e-12)).any(dim=-1)
    if differs.any():
        index = int(differs.nonzero()[0])
        raise ValueError(
            f"plain parameter {index} of shape {tuple(parameters[index].shape)} differs between the ranks of the "
            "process group, so it is not replicated: if each rank holds another part of the model (ZeRO), pass "
            'plain="sharded"; if it should be replicated, initialize it equally (DistributedDataParallel does); if '
            "these ranks do not train one model, pass their process_group"
        )


def _find_fsdp1_replicas(
    parameters: Sequence[Tensor], group: ProcessGroup, device: torch.device, dtype: torch.dtype
) -> int:
    """Number of ranks that hold each FSDP1 shard: 1 for FULL_SHARD, the number of replicas for HYBRID_SHARD.

    FSDP1's parameters do not expose their group, but ranks that hold the same shard hold the same values.
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
        "cannot infer from the values of the FSDP1 parameters how often each shard is replicated: "
        + ("all are constant" if not counts else f"some parameters are held {sorted(counts)} times")
        + '. Pass plain="sharded" and process_group=<the FSDP sharding group>, which holds the model once'
    )
