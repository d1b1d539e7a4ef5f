"""Param groups, state and defaults of several optimizers as one; what is written to them arrives in the optimizers.

It knows optimizers, and nothing of what wraps them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["JointDefaults", "JointGroups", "JointState", "assign_groups", "assign_state", "parameter_states"]


def parameter_states(optimizers: Sequence[Optimizer]) -> Iterator[tuple[Optimizer, Tensor, dict[str, Any]]]:
    """Every parameter that has a state, with its optimizer; some keep other things in ``state``, too."""
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            if isinstance(parameter, Tensor) and isinstance(state, dict):
                yield optimizer, parameter, state


class JointState(MutableMapping[Any, Any]):
    """The states of several optimizers as one mapping from parameter to dict; writes go to the optimizers' states.

    Args:
        optimizers: The optimizers, over disjoint parameters.
        is_complete: Returns whether every state that a checkpoint needs exists.
    """

    def __init__(self, optimizers: Sequence[Optimizer], is_complete: Any) -> None:
        self._optimizers = optimizers
        self._is_complete = is_complete

    def _home(self, key: Any) -> MutableMapping[Any, Any]:
        for optimizer in self._optimizers:
            if key in optimizer.state:
                return optimizer.state
        return _owner(self._optimizers, key).state

    def __getitem__(self, key: Any) -> Any:
        return self._home(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._home(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._home(key)[key]

    def __contains__(self, key: object) -> bool:
        return any(key in optimizer.state for optimizer in self._optimizers)

    def __iter__(self) -> Iterator[Any]:
        for optimizer in self._optimizers:
            yield from list(optimizer.state)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)

    def __bool__(self) -> bool:
        # Torch's checkpointing runs a step if the state is false; some bases fill their state in the constructor.
        return bool(self._is_complete())

    def __repr__(self) -> str:
        return repr(dict(self))


def assign_state(optimizers: Sequence[Optimizer], state: Mapping[Any, Any]) -> None:
    """Let ``state`` be the optimizers' state; the mapping itself if there is one optimizer, as with torch."""
    if isinstance(state, JointState):
        if [id(optimizer) for optimizer in state._optimizers] == [id(optimizer) for optimizer in optimizers]:
            return
        state = defaultdict(dict, state)
    if len(optimizers) == 1 and isinstance(state, MutableMapping):
        optimizers[0].state = state  # type: ignore[assignment]
        return
    for optimizer in optimizers:
        optimizer.state.clear()
    for key, value in state.items():
        _owner(optimizers, key).state[key] = value


class JointGroups(list[dict[str, Any]]):
    """The param groups of several optimizers, in their order; a change of the list arrives in the optimizers.

    Args:
        optimizers: The optimizers.
        assign: Called with the changed list.
    """

    def __init__(self, optimizers: Sequence[Optimizer], assign: Callable[[list[dict[str, Any]]], None]) -> None:
        super().__init__(group for optimizer in optimizers for group in optimizer.param_groups)
        self._assign = assign

    def __reduce_ex__(self, protocol: Any) -> Any:
        return list, (list(self),)  # a copy is a list of its own


def _assigning(name: str) -> Callable[..., Any]:
    def method(self: JointGroups, *args: Any, **kwargs: Any) -> Any:
        result = getattr(list, name)(self, *args, **kwargs)
        self._assign(list(self))
        return result

    return method


for _name in (
    "__delitem__", "__iadd__", "__imul__", "__setitem__", "append", "clear", "extend", "insert", "pop", "remove",
    "reverse", "sort",
):  # fmt: skip
    setattr(JointGroups, _name, _assigning(_name))


def assign_groups(optimizers: Sequence[Optimizer], groups: list[dict[str, Any]]) -> None:
    """Let ``groups`` be the optimizers' param groups; the list itself if there is one optimizer, as with torch.

    Raises:
        ValueError: with several optimizers, if a group is of none of them, or not in their order; nothing has changed.
    """
    if len(optimizers) == 1:
        optimizers[0].param_groups = groups
        return
    parts: list[list[dict[str, Any]]] = [
        [group for group in groups if _has_group(optimizer, group)] for optimizer in optimizers
    ]
    if [id(group) for part in parts for group in part] != [id(group) for group in groups]:
        raise ValueError(
            "param groups of several base optimizers were assigned that are not theirs, or not in their order: each "
            "must be a group of one of them, or hold only parameters of one. To add a group, call add_param_group on "
            "the base optimizer that should own it"
        )
    for optimizer, part in zip(optimizers, parts):
        optimizer.param_groups[:] = part


class JointDefaults(dict[str, Any]):
    """The defaults that several optimizers have in common, with the first one's values; read-only.

    Args:
        optimizers: The optimizers.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        first, *others = (optimizer.defaults for optimizer in optimizers)
        super().__init__((key, value) for key, value in first.items() if all(key in other for other in others))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self),)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """The value, or ``default``, which is not kept: torch asks so for what an optimizer may lack."""
        return self.get(key, default)


def _refuse_defaults(self: JointDefaults, *_: Any, **__: Any) -> Any:
    raise TypeError(
        "the defaults of several base optimizers cannot be changed together: change those of the base optimizer that "
        "is to have the group"
    )


for _name in ("__delitem__", "__ior__", "__setitem__", "clear", "pop", "popitem", "update"):
    setattr(JointDefaults, _name, _refuse_defaults)


def _owner(optimizers: Sequence[Optimizer], parameter: Any) -> Optimizer:
    """The optimizer that has ``parameter`` in a group; the first if none has."""
    for optimizer in optimizers:
        if any(parameter is each for group in optimizer.param_groups for each in group["params"]):
            return optimizer
    return optimizers[0]


def _has_group(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    if any(group is each for each in optimizer.param_groups):
        return True
    members = {id(parameter) for each in optimizer.param_groups for parameter in each["params"]}
    return bool(group["params"]) and all(id(parameter) in members for parameter in group["params"])
