"""Whether a base optimizer moves a displaced parameter back, seen in one step of a copy of it.

Mechanic leaves a parameter elsewhere than the base optimizer did. An optimizer that computes the position anew from
what it has summed (FTRL, dual averaging), or projects it (onto a sphere), does not go on from there. It knows one
parameter of an optimizer, and neither ranks nor how a step is scaled.
"""

from __future__ import annotations

import copy
import gc
import random
import sys
import types
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Its public name, torch.utils.debug_mode, cannot refuse an operation. tests/optimizer/test_displaced.py fails without.
from torch.utils._python_dispatch import TorchDispatchMode

from manic.distributed.layout import local_storage
from manic.optimizer.kinds import has_step_hooks
from manic.optimizer.names import GROUP_KEY, STATE_KEYS

__all__ = ["ChangedByACopyError", "share_moved_back"]

# The displacement as a share of the parameter's size.
_DISPLACED = 0.1
# The learning rate of the copy as a share of the optimizer's, so that weight decay in proportion to it moves nothing.
_SLOW = 1e-6
# And where it should move something: far enough that no dtype rounds that away.
_FAST = 1e3
# How large the rounding of x may be after the step, as a share of the displacement.
_ROUNDED = 0.25

# Bytes of tensors up to which an optimizer is copied, and how many objects are searched for them.
_COPIED = 1 << 26
_THINGS = 100_000

_OWN_KEYS = frozenset(STATE_KEYS)
# A scheduler puts a step in the place of the class's.
_NOT_COPIED = ("state", "param_groups", "step")
# What a deep copy shares with the original, besides functions and references, and nobody can change.
_SIMPLE = (type, types.ModuleType, types.CodeType, str, bytes, int, float, complex, type(None), torch.dtype)
# A method is not among these: its copy is bound to the copy of its object.
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodWrapperType)


class ChangedByACopyError(Exception):
    """The step of a copy has changed the optimizer's own parameters or state."""


class _CannotCopy(Exception):
    """A copy of the optimizer could not step by itself."""


class _Alone(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses collectives: other ranks need not make this step."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            raise _CannotCopy
        return func(*args, **(kwargs or {}))


def share_moved_back(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, x: Tensor, g: Tensor) -> float:
    """How much of a displacement of ``parameter`` the optimizer's next step undoes, at a learning rate of almost 0.

    Args:
        optimizer: A base optimizer. Neither it nor what it holds is changed.
        group: The param group of ``parameter``.
        parameter: As the optimizer knows it.
        x: Its local values; a plain tensor of floating point, not all 0.
        g: The gradient of the same elements.

    Returns:
        0: nothing; 1: all of it. 0 also where it cannot be asked: the optimizer has no learning rate or does not follow
        it, has step hooks or ``__del__``, keeps functions that hold objects, communicates, or cannot be copied.

    Raises:
        ChangedByACopyError: if a copy has changed the optimizer's own parameters or state after all.
    """
    try:
        _raise_unless_copied(optimizer, group, parameter)
        seen = _Seen(optimizer, parameter)
    except Exception:  # as below
        return 0.0
    try:
        return _share(optimizer, group, parameter, x, g)
    except Exception:  # whatever a copy of an unknown optimizer may raise: nothing is known then
        return 0.0
    finally:
        seen.raise_if_changed()


def _share(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, x: Tensor, g: Tensor) -> float:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x.device, x.dtype)
    size = torch.linalg.vector_norm(x) / x.numel() ** 0.5
    moved = x + _DISPLACED * (x + size * noise)
    with torch.compiler.set_stance("force_eager"), _Alone():  # type: ignore[no-untyped-call]
        here, there, fast = (
            _after_a_step(optimizer, group, parameter, start, g, speed)
            for start, speed in ((x, _SLOW), (moved, _SLOW), (x, _FAST))
        )
    if torch.equal(here, fast) and not torch.equal(here, there):
        return 0.0  # the step does not follow the learning rate, so weight decay cannot be told from a projection
    displacement = (moved.double() - x.double()).flatten()
    rest = (there.double() - here.double()).flatten()
    if torch.linalg.vector_norm(here.double()) * torch.finfo(x.dtype).eps > _ROUNDED * displacement.norm():
        return 0.0  # such a step, of a momentum say, rounds the displacement away
    share = float(1.0 - (rest @ displacement) / (displacement @ displacement))
    return share if share == share else 0.0


class _Seen:
    """The parameters and state tensors of an optimizer as they are now."""

    def __init__(self, optimizer: Optimizer, parameter: Tensor) -> None:
        states = (list(state.values()) for state in optimizer.state.values() if type(state) is dict)
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        tensors += [value for state in states for value in state if isinstance(value, Tensor)]
        self._tensors = [each for each in map(local_storage, tensors) if not each.is_inference()]
        # There is no public count of writes. tests/optimizer/test_displaced.py fails without.
        self._versions = [each._version for each in self._tensors]
        self._parameter = local_storage(parameter)
        self._values = self._parameter.detach().clone()  # writes through .data are not counted

    def raise_if_changed(self) -> None:
        is_same = torch.allclose(self._parameter, self._values, rtol=0.0, atol=0.0, equal_nan=True)
        if not is_same or self._versions != [each._version for each in self._tensors]:
            raise ChangedByACopyError


def _raise_unless_copied(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
    """Refuse an optimizer whose deep copy would be large, or would share with it what a step may change.

    Functions are not copied, so what they hold is the optimizer's own; a ``__del__`` may free what both use.
    """
    held = vars(optimizer)
    if not held.keys() >= {"state", "param_groups"} or has_step_hooks(optimizer) or group.get("lr") is None:
        raise _CannotCopy
    if hasattr(type(optimizer), "__del__"):
        raise _CannotCopy
    stand_ins = {id(p) for one in optimizer.param_groups for p in one["params"]}
    seen, storages = {id(optimizer), id(optimizer.state), *stand_ins}, dict[int, int]()
    things = [value for name, value in held.items() if name not in _NOT_COPIED]
    things += [value for key, value in group.items() if key not in ("params", GROUP_KEY)]
    things += [value for key, value in optimizer.state.get(parameter, {}).items() if key not in _OWN_KEYS]
    while things:
        thing = things.pop()
        kind = type(thing)  # isinstance() may run code of the object
        if id(thing) in seen or issubclass(kind, _SIMPLE):
            continue
        seen.add(id(thing))
        if issubclass(kind, Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storage = local_storage(tensor).untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
        elif issubclass(kind, _FUNCTIONS):
            things += _functions_held_by(thing)
        elif issubclass(kind, (weakref.ref, *weakref.ProxyTypes)) or hasattr(kind, "__del__"):
            raise _CannotCopy
        else:
            things += gc.get_referents(thing)
        if sum(storages.values()) > _COPIED or len(seen) > _THINGS + len(stand_ins):
            raise _CannotCopy


def _functions_held_by(function: Any) -> list[Any]:
    """The functions that a function holds; it may hold nothing else that can be changed."""
    cells = getattr(function, "__closure__", None) or ()
    defaults = getattr(function, "__defaults__", None) or ()
    more = {**(getattr(function, "__kwdefaults__", None) or {}), **getattr(function, "__dict__", {})}
    held = [*(cell.cell_contents for cell in cells), *defaults, *more.values(), getattr(function, "__self__", None)]
    if not all(issubclass(type(each), (*_SIMPLE, *_FUNCTIONS)) for each in held):
        raise _CannotCopy
    return held


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Restore the state of Python's, numpy's and torch's generators afterwards."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


def _after_a_step(
    optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, x: Tensor, g: Tensor, speed: float
) -> Tensor:
    """Where a copy of the optimizer, of one parameter at ``x`` and ``speed`` times the learning rate, takes it."""
    stand_in: Tensor = nn.Parameter(x.detach().clone())
    stand_in.grad = g.detach().clone()
    # Wherever else the optimizer holds parameters, the copy finds tensors without elements and gradient.
    memo: dict[int, Any] = {
        id(p): nn.Parameter(x.new_empty(0)) for one in optimizer.param_groups for p in one["params"]
    }
    memo[id(parameter)] = stand_in
    twin = object.__new__(type(optimizer))
    memo[id(optimizer)] = twin
    vars(twin).update(
        copy.deepcopy({name: value for name, value in vars(optimizer).items() if name not in _NOT_COPIED}, memo)
    )
    state = {
        key: local_storage(value) if isinstance(value, Tensor) else value  # as plain as the stand-in
        for key, value in optimizer.state.get(parameter, {}).items()
        if key not in _OWN_KEYS
    }
    twin.state = defaultdict(dict, {stand_in: copy.deepcopy(state, memo)} if state else {})
    settings = {key: value for key, value in group.items() if key not in ("params", GROUP_KEY)}
    twin.param_groups = [{**copy.deepcopy(settings, memo), "lr": group["lr"] * speed, "params": [stand_in]}]
    with _random_numbers_kept():
        twin.step()
    return stand_in.detach()
