"""Which elements of each parameter this rank holds, and how many ranks of the group hold them.

It reads tensors' types, placements and meshes, and the group's ranks. It does no arithmetic on their elements and
no communication.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate

__all__ = ["Layout", "Plain", "check_gradient", "is_fsdp1", "local", "local_gradient", "local_storage"]

Plain = Literal["replicated", "sharded"]
"""What plain tensors are to the ranks of the group: the same on each (DDP), or other parts on each (ZeRO)."""

# FSDP1's mark on its flat parameters and on the original parameters that are views of them. It has no public form;
# FSDP1 itself tells its parameters by it, and tests/distributed/test_layout.py fails if it goes.
_FSDP1_MARK = "_fsdp_flattened"


def is_fsdp1(parameter: Tensor) -> bool:
    """Whether ``parameter`` is managed by ``torch.distributed.fsdp.FullyShardedDataParallel``."""
    return getattr(parameter, _FSDP1_MARK, False)


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` on this rank: a plain tensor without autograd that shares its storage.

    Call it where gradients are disabled.
    """
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor.detach() if tensor.requires_grad else tensor


def local_storage(tensor: Tensor) -> Tensor:
    """What holds the storage of :func:`local`: the same object each time, as long as nothing exchanges it.

    ``DTensor.to_local()`` makes a view of a parameter's each time, at forty times the host's cost of this attribute,
    which has no public form; tests/distributed/test_layout.py fails if it goes.
    """
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def local_gradient(parameter: Tensor) -> Tensor | None:
    """The gradient of the elements that :func:`local` gives, or ``None``.

    A DTensor gradient that is placed otherwise than its parameter (a sum not yet made, say) is redistributed first, and
    ``parameter.grad`` becomes the result, so that the base optimizer need not do it again.

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
    """Raise TypeError if ``gradient`` of ``parameter`` is one that Mechanic cannot use."""
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
    """How the elements of the model are spread over the ranks that train it together.

    Args:
        process_group: The ranks that hold the model between them, once or several times. ``None``: all ranks if
            ``torch.distributed`` is initialised, else this process alone.
        plain: What tensors that are not DTensors are to these ranks. Parameters of FSDP1 are recognised and need no
            declaration under ``"replicated"``; ``"sharded"`` holds for them too.
        pipeline_stages: Into how many stages of equally many ranks a pipeline splits the group. A parameter exists
            in its own stage only.

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
        """How many ranks hold each element of an FSDP1 shard; found when the ranks first compare notes."""
        self._holders: dict[Any, float] = {}

    @property
    def group(self) -> ProcessGroup | None:
        """The group to reduce over; ``None`` where there is nobody else."""
        if self._declared_group is None and not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self._declared_group is None else self._declared_group
        return group if dist.get_world_size(group) > 1 else None

    @property
    def world_size(self) -> int:
        """How many ranks there are to reduce over."""
        group = self.group
        return 1 if group is None else dist.get_world_size(group)

    @property
    def is_first_rank(self) -> bool:
        """Whether this rank is the one to say what all have to say."""
        group = self.group
        return group is None or dist.get_rank(group) == 0

    def communication_device(self, home: torch.device) -> torch.device:
        """Where the group's backend takes tensors from, as near to ``home`` as can be."""
        group = self.group
        if group is None:
            return home
        if home.type == "cpu" and "gloo" not in dist.get_backend_config(group) and "nccl" in dist.get_backend(group):
            return torch.device("cuda", torch.cuda.current_device())
        return home

    def replicas(self, parameter: Tensor) -> float:
        """How many ranks of the group hold each local element of ``parameter``.

        Raises:
            ValueError: if the group does not hold the parameter whole, or some elements oftener than others.
        """
        group = self.group
        if group is None:
            return 1.0
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

    def _dtensor_replicas(self, parameter: DTensor, group: ProcessGroup) -> float:
        mesh, placements = parameter.device_mesh, parameter.placements
        if any(placement.is_partial() for placement in placements):
            raise ValueError(f"a parameter cannot be placed as {placements}: its value is a sum that was never made")
        inside = torch.isin(mesh.mesh, torch.tensor(dist.get_process_group_ranks(group))).float()
        # Anything but Replicate splits: _StridedShard (TP + FSDP2) is neither a Shard nor says is_shard().
        replicated = [dim for dim, placement in enumerate(placements) if isinstance(placement, Replicate)]
        holders = inside.sum(dim=replicated) if replicated else inside
        if holders.min() < 1 or holders.min() != holders.max():
            raise ValueError(
                f"the process group's ranks {dist.get_process_group_ranks(group)} do not hold a parameter of shape "
                f"{tuple(parameter.shape)}, placed as {placements} on {mesh}, a whole number of times; pass the "
                "process_group of all ranks that hold the model between them"
            )
        # Under TP + FSDP2 a norm weight lives on the dp mesh alone: ranks outside of its mesh hold copies of it,
        # which its placements don't show. Another pipeline stage holds none.
        copies = self._stage_size(group) / float(inside.sum())
        if copies != int(copies):
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} is on {int(inside.sum())} of the "
                f"{self._stage_size(group):g} ranks of a pipeline stage, which is no whole number of copies; set "
                "process_group and pipeline_stages to what the model is spread over"
            )
        return float(holders.max()) * copies

    def _stage_size(self, group: ProcessGroup) -> float:
        return dist.get_world_size(group) / self.pipeline_stages

    def __deepcopy__(self, memo: dict[int, Any]) -> Layout:
        # A process group cannot be copied, and a copy of the optimizer lives on the same ranks.
        return self

    def __getstate__(self) -> dict[str, Any]:
        if self._declared_group is not None:
            raise TypeError(
                "a Mechanic with an explicit process_group cannot be pickled; save its state_dict() instead"
            )
        return {**self.__dict__, "_holders": {}}
