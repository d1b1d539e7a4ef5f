"""Startup check: ranks compare their parameters and settings; if they differ, all raise the same error.

Runs at the first step, after parameters were added and after a load; other steps do not compare ranks unless the
drift check does. copies.py compares values.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from manic.distributed.collectives import from_every_rank, gather, is_simulated, on_any_rank, raise_together
from manic.distributed.copies import Copies
from manic.distributed.layout import Layout, check_gradient, is_expert_parallel, is_fsdp1

__all__ = ["Agreement", "agree", "describe_group", "digest"]


# Experts that have no gradient in so many first steps remain counted by their values.
_COMPARISONS = 32


class Agreement:
    """Remembers the parameters that the ranks have compared, so that they compare again only after a change.

    Args:
        layout: The placement of the model over the ranks.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._identities: list[Any] | None = None
        self._unconfirmed: set[int] | None = None
        self._comparisons_left = _COMPARISONS

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the optimizer has parameters of its own.
        return {**self.__dict__, "_identities": None, "_unconfirmed": None}

    def holds_for(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the ranks have compared exactly these parameters, and nothing tells more of them; alike on all ranks.

        Where no gradient confirms a number of copies they compare again, in so many steps at most.
        """
        is_open = self._unconfirmed is not None and self._comparisons_left > 0
        if is_open and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            is_open = False  # a comparison reads from the device
        return self._identities == _identities(groups) and not is_open

    def forget(self) -> None:
        """Compare all before the next step."""
        self._identities = self._unconfirmed = None

    def renew(
        self,
        groups: Sequence[Mapping[str, Any]],
        settings: str,
        of_stage: str,
        device: torch.device,
        dtype: torch.dtype,
    ) -> bool:
        """Compare again; see :func:`agree` for arguments and errors.

        Returns:
            Whether all was compared; otherwise only numbers of copies that no gradient had confirmed.
        """
        identities = _identities(groups)
        is_new = self._identities != identities
        self._comparisons_left = (_COMPARISONS if is_new else self._comparisons_left) - 1
        unconfirmed = None if is_new else self._unconfirmed
        self._unconfirmed = agree(groups, settings, of_stage, self._layout, device, dtype, unconfirmed)
        self._identities = identities
        return is_new


def _identities(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    # By group: inside ZeRO, a rank's part of a new group may be empty.
    return [(is_expert_parallel(group), [id(parameter) for parameter in group["params"]]) for group in groups]


def agree(
    groups: Sequence[Mapping[str, Any]],
    settings: str,
    of_stage: str,
    layout: Layout,
    device: torch.device,
    dtype: torch.dtype,
    unconfirmed: Container[int] | None = None,
) -> set[int] | None:
    """Check over the group that all ranks hold what ``layout`` declares and have the same settings.

    Args:
        groups: The optimizer's param groups.
        settings: Further settings that must be equal, in words.
        of_stage: Those that must be equal on the ranks of a pipeline stage, in words.
        layout: The placement of the model; this function sets its ``fsdp1_replicas`` and ``counted``.
        device: A device that the group's backend supports.
        dtype: The dtype of compared sums: the tuner's.
        unconfirmed: The result of an earlier comparison of the same parameters: only these are compared by value again.

    Returns:
        The ``id`` of each expert-parallel parameter of this rank that has a number of copies which no gradient confirms
        yet; ``None`` if there are none on any rank.

    Raises:
        TypeError: on every rank, if any rank has a gradient that Mechanic cannot use.
        ValueError: on every rank, if settings, param groups, parameters, shapes, dtypes or placements differ between
            ranks of a stage, or if parameters that should be copies differ.
    """
    group = layout.group
    parameters = [parameter for each in groups for parameter in each["params"]]
    raise_together(TypeError, _unusable_gradient(parameters), group, device)
    if group is None:
        return None
    if dist.get_world_size(group) % layout.pipeline_stages:
        raise ValueError(
            f"pipeline_stages={layout.pipeline_stages} does not divide the process group's "
            f"{dist.get_world_size(group)} ranks"
        )
    if is_simulated(group):
        return None
    common = f"{settings}, plain={layout.plain}, pipeline_stages={layout.pipeline_stages}"
    held = [
        text
        for each in groups
        for text in (describe_group(each), *(_describe(parameter, each, layout) for parameter in each["params"]))
        if text is not None
    ]
    copies, stages = Copies(groups, layout), layout.pipeline_stages
    mine = [digest(common), digest(of_stage), digest("\n".join(held)), *copies.numbers]
    columns = torch.stack(gather(torch.tensor(mine, device=device), group)).T.tolist()
    _compare(columns[0], 1, "settings", [common], group)
    _compare(columns[1], stages, "settings", [of_stage], group)
    _compare(columns[2], stages, "param groups or parameters", held, group)
    raise_together(ValueError, _uneven(groups, layout), group, device)
    numbers = [max(column) for column in columns[3:]]
    found = copies.compare(numbers, columns[2], group, device, dtype, unconfirmed)
    return found if any(numbers) and on_any_rank(bool(found), group, device) else None


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


def _uneven(groups: Sequence[Mapping[str, Any]], layout: Layout) -> str:
    """The first parameter that the group does not hold evenly, in words; empty: none."""
    for group in groups:
        for parameter in group["params"]:
            try:
                layout.replicas(parameter, is_declared=is_expert_parallel(group))
            except ValueError as error:
                return str(error)
    return ""


def _describe(parameter: Tensor, group: Mapping[str, Any], layout: Layout) -> str | None:
    """The properties of ``parameter`` that must be equal on all ranks of a stage; ``None`` if there are none."""
    if is_expert_parallel(group):
        return None
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
