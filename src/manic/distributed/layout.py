"""Which elements of each parameter this rank holds, and how many replicas of them the group has.

Reads tensors' types, placements and meshes, and the group's ranks; does not read elements and does not communicate.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate

__all__ = [
    "EXPERT_PARALLEL", "Layout", "Plain", "check_gradient", "is_expert_parallel", "is_fsdp1", "local", "local_gradient",
    "local_storage",
]  # fmt: skip

Plain = Literal["replicated", "sharded"]
"""Placement of plain tensors over the group: the same on each rank (DDP), or different parts on each (ZeRO)."""

EXPERT_PARALLEL = "expert_parallel"
"""Key of a param group, true if its parameters may differ between ranks outside of their own meshes: experts of which
each rank, or each group of ranks, has its own."""

# The private attribute by which FSDP1 marks its flat parameters and the original parameters that are views of them.
# tests/distributed/test_layout.py fails if it is removed.
_FSDP1_MARK = "_fsdp_flattened"


def is_fsdp1(parameter: Tensor) -> bool:
    """Whether ``torch.distributed.fsdp.FullyShardedDataParallel`` manages ``parameter``."""
    return getattr(parameter, _FSDP1_MARK, False)


def is_expert_parallel(group: Mapping[str, Any]) -> bool:
    """Whether the param group ``group`` declares its parameters expert-parallel."""
    return bool(group.get(EXPERT_PARALLEL, False))


def local(tensor: Tensor) -> Tensor:
    """The shard of ``tensor`` on this rank: a plain tensor without autograd that shares its storage.

    Must be called with gradients disabled.
    """
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor.detach() if tensor.requires_grad else tensor


def local_storage(tensor: Tensor) -> Tensor:
    """The tensor that holds the storage of :func:`local`: the same object in each call until it is replaced.

    ``DTensor.to_local()`` creates a view in each call, at forty times the host time of this private attribute;
    tests/distributed/test_layout.py fails if it is removed.
    """
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def local_gradient(parameter: Tensor) -> Tensor | None:
    """The gradient of the elements of :func:`local`, or ``None``.

    A DTensor gradient with other placements than its parameter (for example Partial) is redistributed first and stored
    in ``parameter.grad``, so that the base optimizer does not redistribute it again.

    Raises:
        TypeError: if the gradient is sparse, complex, or plain where the parameter is a DTensor.
    """
    gradient = parameter.grad
    if gradient is None:
        return None
    check_gradient(parameter, gradient)
    if not isinstance(gradient, DTensor):
        return local(gradient)
    if gradient.placements != parameter.placements:  # type: ignore[attr-defined]
        gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
        parameter.grad = gradient
    return local_storage(gradient)


def check_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Raise TypeError if Mechanic cannot use ``gradient`` of ``parameter``."""
    if gradient.layout != torch.strided or gradient.is_complex():
        kind = "complex" if gradient.is_complex() else "sparse"
        raise TypeError(
            f"a parameter of shape {tuple(parameter.shape)} has a {kind} gradient; Mechanic needs dense real ones "
            "(for an embedding, pass sparse=False)"
        )
    if isinstance(parameter, DTensor) and not isinstance(gradient, DTensor):
        raise TypeError(
            f"a DTensor parameter of shape {tuple(parameter.shape)} has a plain gradient; expected a DTensor with "
            "the parameter's mesh and placements"
        )


class Layout:
    """The placement of the model's elements over the ranks that train it.

    Args:
        process_group: The ranks that together hold the model, once or several times. ``None``: all ranks if
            ``torch.distributed`` is initialised, else this process alone.
        plain: Placement of tensors that are not DTensors. With ``"replicated"``, parameters of FSDP1 are recognised;
            ``"sharded"`` applies to them too.
        pipeline_stages: Number of pipeline stages in the group, each of equally many ranks. A parameter exists in one
            stage only.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, process_group: ProcessGroup | None, plain: Plain, pipeline_stages: int) -> None:
        if plain not in get_args(Plain):
            raise ValueError(f"plain must be one of {get_args(Plain)}, got {plain!r}")
        if not isinstance(pipeline_stages, int) or pipeline_stages < 1:
            raise ValueError(f"pipeline_stages must be a positive int, got {pipeline_stages!r}")
        self.plain = plain
        self.pipeline_stages = pipeline_stages
        if process_group is not None and dist.get_rank(process_group) < 0:
            raise ValueError("this rank is not in process_group; pass the group of the ranks that train this model")
        self._declared_group = process_group
        self.fsdp1_replicas = 1
        """Number of ranks that hold each element of an FSDP1 shard; set by ``Copies.compare``."""
        self.counted: dict[int, float] = {}
        """Number of ranks that hold each expert-parallel parameter, by its ``id``; set by ``Copies.compare``, too."""
        self._holders: dict[Any, float] = {}

    @property
    def group(self) -> ProcessGroup | None:
        """The group to reduce over; ``None`` if this process is alone."""
        if self._declared_group is None and not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self._declared_group is None else self._declared_group
        return group if dist.get_world_size(group) > 1 else None

    @property
    def world_size(self) -> int:
        """Number of ranks to reduce over."""
        group = self.group
        return 1 if group is None else dist.get_world_size(group)

    @property
    def place_among_stages(self) -> tuple[int, int] | None:
        """This rank and the number of ranks, if their param groups may differ for a pipeline; else ``None``."""
        group = self.group
        return None if group is None or self.pipeline_stages == 1 else (dist.get_rank(group), self.world_size)

    @property
    def is_first_rank(self) -> bool:
        """Whether this rank logs for the group."""
        group = self.group
        return group is None or dist.get_rank(group) == 0

    def communication_device(self, home: torch.device) -> torch.device:
        """A device that the group's backend supports: ``home`` if possible."""
        group = self.group
        if group is None:
            return home
        if home.type == "cpu" and "gloo" not in dist.get_backend_config(group) and "nccl" in dist.get_backend(group):
            return torch.device("cuda", torch.cuda.current_device())
        return home

    def replicas(self, parameter: Tensor, *, is_declared: bool = False) -> float:
        """Number of ranks of the group that hold each local element of ``parameter``.

        Args:
            parameter: The parameter.
            is_declared: Whether its param group declares it expert-parallel. It counts as held once until the ranks
                have compared it.

        Raises:
            ValueError: if the group does not hold every element of the parameter, and each equally often.
        """
        group = self.group
        if group is None:
            return 1.0
        if is_declared and (isinstance(parameter, DTensor) or self.plain == "replicated"):
            return self.counted.get(id(parameter), 1.0)
        if isinstance(parameter, DTensor):
            key = (parameter.device_mesh, parameter.placements)
            if key not in self._holders:
                self._holders[key] = self._dtensor_replicas(parameter, group)
            return self._holders[key]
        if self.plain == "sharded":
            return 1.0
        if is_fsdp1(parameter):
            return float(self.fsdp1_replicas)
        return self._stage_size(group)

    def has_copies_outside(self, parameter: DTensor) -> bool:
        """Whether ranks outside of the parameter's mesh are taken to hold copies, which no placement shows."""
        group = self.group
        return group is not None and float(self._inside(parameter, group).sum()) < self._stage_size(group)

    @staticmethod
    def _inside(parameter: DTensor, group: ProcessGroup) -> Tensor:
        """1 where a rank of the parameter's mesh is in the group, else 0, in the mesh's shape."""
        mesh = parameter.device_mesh.mesh
        return torch.isin(mesh, torch.tensor(dist.get_process_group_ranks(group), device=mesh.device)).float()

    def _dtensor_replicas(self, parameter: DTensor, group: ProcessGroup) -> float:
        mesh, placements = parameter.device_mesh, parameter.placements
        if any(placement.is_partial() for placement in placements):
            raise ValueError(f"a parameter cannot have placements {placements}: Partial values are not reduced")
        inside = self._inside(parameter, group)
        # Every placement except Replicate splits; _StridedShard (TP + FSDP2) is not a Shard, and is_shard() is False.
        replicated = [dim for dim, placement in enumerate(placements) if isinstance(placement, Replicate)]
        holders = inside.sum(dim=replicated) if replicated else inside
        if holders.min() < 1 or holders.min() != holders.max():
            raise ValueError(
                f"the process group's ranks {dist.get_process_group_ranks(group)} do not hold a parameter of shape "
                f"{tuple(parameter.shape)}, placed as {placements} on {mesh}, a whole number of times; pass the "
                "process_group of all ranks that together hold the model"
            )
        # With TP + FSDP2 the mesh of a norm weight is the dp mesh alone: ranks outside that mesh hold replicas which
        # its placements do not show. Other pipeline stages hold none.
        copies = self._stage_size(group) / float(inside.sum())
        if copies != int(copies):
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} is on {int(inside.sum())} of the "
                f"{self._stage_size(group):g} ranks of a pipeline stage, which is not a whole number of replicas; set "
                "process_group and pipeline_stages to those of the model"
            )
        return float(holders.max()) * copies

    def _stage_size(self, group: ProcessGroup) -> float:
        return dist.get_world_size(group) / self.pipeline_stages

    def __deepcopy__(self, memo: dict[int, Any]) -> Layout:
        # A process group cannot be copied, and a copy of the optimizer has the same ranks, but parameters of its own.
        other = copy.copy(self)
        other.counted = {}
        return other

    def __getstate__(self) -> dict[str, Any]:
        if self._declared_group is not None:
            raise TypeError(
                "a Mechanic with an explicit process_group cannot be pickled; save its state_dict() instead"
            )
        return {**self.__dict__, "_holders": {}, "counted": {}}
