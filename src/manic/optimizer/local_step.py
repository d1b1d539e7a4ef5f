"""The base optimizer's step on local shards: plain tensors that share the storage of DTensors.

Where an update makes each element from elements at the same place, the shard on this rank is all that it needs. Each
operation on a DTensor takes the host several times as long as the same operation on a plain tensor, and an optimizer
makes several for each parameter. What stands in for the DTensors is made for one step, and nothing is kept: so nothing
can be out of date in the next step, and nobody's memory is held between steps.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from manic.optimizer.kinds import is_elementwise
from manic.optimizer.names import STATE_KEYS
from manic.step.base_step import give_gradient, restored

__all__ = ["step_on_shards"]

_OWN_KEYS = frozenset(STATE_KEYS)

# What torch.optim keeps under a parameter that is one number, and no tensor of the parameter's shape. The shape alone
# would not tell it for a parameter without dimensions.
_NUMBERS = frozenset(("step", "eta", "mu", "mu_product"))

_ABSENT = object()


def step_on_shards(optimizer: Optimizer) -> None:
    """Let ``optimizer`` take its step, on local shards where it has DTensors and is known to do the same with them.

    Its parameters, groups and state are the same afterwards as after its own step, bit for bit. If the step raises,
    groups, gradients and the names in its state are as before it.

    Args:
        optimizer: A base optimizer.
    """
    shards = _find(optimizer) if is_elementwise(optimizer) else None
    if shards is None:
        optimizer.step()
        return
    with restored(shards.leave):
        shards.enter()
        optimizer.step()
    shards.store()


class _Shards:
    """The local shards of an optimizer's parameters and state, for one step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer, self._states = optimizer, optimizer.state
        self._local_states: defaultdict[Tensor, Any] = defaultdict(dict)
        # A DTensor, and the tensor in its place.
        self._stand_ins: list[tuple[DTensor, Tensor]] = []
        # Groups with a DTensor, their parameters, and those for the step.
        self._groups: list[tuple[dict[str, Any], list[Tensor], list[Tensor]]] = []

    def add(self, group: dict[str, Any]) -> bool:
        """Find stand-ins for a param group; return False if one of its DTensors cannot have any."""
        members: list[Tensor] = []
        count = len(self._stand_ins)
        for parameter in group["params"]:
            if not isinstance(parameter, DTensor):
                if parameter in self._states:
                    self._local_states[parameter] = self._states[parameter]
                members.append(parameter)
                continue
            gradient = parameter.grad
            if gradient is None:  # optimizers leave it alone
                continue
            shard, shard_of_gradient = _plain_shard(parameter, parameter), _plain_shard(parameter, gradient)
            state = _plain_state(parameter, self._states.get(parameter) or {})
            if shard is None or shard_of_gradient is None or state is None:
                return False
            tensor = shard.detach()
            give_gradient(tensor, shard_of_gradient)
            members.append(tensor)
            self._stand_ins.append((parameter, tensor))
            if state:
                self._local_states[tensor] = state
        if len(self._stand_ins) > count:
            self._groups.append((group, group["params"], members))
        return True

    @property
    def are_found(self) -> bool:
        """Whether there are any."""
        return bool(self._stand_ins)

    def enter(self) -> None:
        """Hand them to the optimizer."""
        increment_version([parameter for parameter, _ in self._stand_ins])  # for backward to see that they change
        self._optimizer.state = self._local_states
        for group, _, members in self._groups:
            group["params"] = members

    def leave(self) -> None:
        """Give the optimizer back what it had; a second call completes one that was interrupted."""
        for group, parameters, _ in self._groups:
            group["params"] = parameters
        self._optimizer.state = self._states

    def store(self) -> None:
        """Store what the step has added to the state. What was there has its storage in common, and is there already.

        An interrupt leaves all of a parameter's new state, or none.
        """
        for parameter, tensor in self._stand_ins:
            after, state = self._local_states.pop(tensor, {}), self._states.get(parameter)
            before = state or {}
            new = {
                name: _distributed(name, value, parameter, tensor)
                for name, value in after.items()
                if not _is_stored(value, before.get(name, _ABSENT))
            }
            gone = [name for name in before if name not in after and name not in _OWN_KEYS]
            if not new and not gone:
                continue
            if state is None:
                self._states[parameter] = new
            else:
                state.update(new)
                for name in gone:
                    del state[name]
        for plain, entries in self._local_states.items():
            self._states[plain] = entries


def _find(optimizer: Optimizer) -> _Shards | None:
    """The local shards of a step; ``None`` if there are no DTensors, or some that cannot be stood in for."""
    groups = optimizer.param_groups
    if not any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"]):
        return None
    shards = _Shards(optimizer)
    return shards if all(map(shards.add, groups)) and shards.are_found else None


def _is_stored(value: Any, stored: Any) -> bool:
    """Whether an entry of the local state is what is ``stored`` for it, or its shard."""
    return value is stored or (isinstance(stored, DTensor) and value is stored._local_tensor)


def _plain_state(parameter: DTensor, state: dict[str, Any]) -> dict[str, Any] | None:
    """What the base optimizer keeps under a parameter, with shards for DTensors; ``None`` if one has no plain shard."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        if name in _OWN_KEYS:  # no base optimizer reads it
            continue
        if isinstance(value, DTensor):
            value = _plain_shard(parameter, value)
            if value is None:
                return None
        found[name] = value
    return found


def _plain_shard(parameter: DTensor, tensor: Tensor) -> Tensor | None:
    """The shard of a DTensor on this rank; ``None`` unless it is plain, and of the same elements as the parameter's.

    The public properties that tell the same take several times as long as this private attribute, which is read for
    every tensor in every step; tests/optimizer/test_local_step.py fails if it is removed.
    """
    if not isinstance(tensor, DTensor):
        return None
    here, there, shard = parameter._spec, tensor._spec, tensor._local_tensor
    is_alike = here is there or (here.mesh, here.placements) == (there.mesh, there.placements)
    return shard if is_alike and type(shard) is Tensor else None


def _distributed(name: str, value: Any, parameter: DTensor, tensor: Tensor) -> Any:
    """A new entry of the state as the optimizer would have made it of ``parameter``, which ``tensor`` stands in for."""
    if name in _NUMBERS or not isinstance(value, Tensor) or value.shape != tensor.shape:
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        value, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )  # fmt: skip
