"""Whether a base optimizer moves a displaced parameter back, seen in one step of a copy of it.

Mechanic leaves a parameter elsewhere than the base optimizer did. An optimizer that computes the position anew from
what it has summed (FTRL, dual averaging), or projects it (onto a sphere), does not go on from there. It knows one
parameter of an optimizer, and neither ranks nor how a step is scaled.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Its public name, torch.utils.debug_mode, cannot refuse an operation. tests/optimizer/test_displaced.py fails without.
from torch.utils._python_dispatch import TorchDispatchMode

from manic.distributed.layout import local_storage
from manic.optimizer.kinds import has_step_hooks
from manic.optimizer.names import GROUP_KEY, STATE_KEYS

__all__ = ["share_moved_back"]

# The displacement as a share of the parameter's size.
_DISPLACED = 0.1
# The learning rate of the copy as a share of the optimizer's, so that weight decay in proportion to it moves nothing.
_SLOW = 1e-6
# How large the rounding of x may be after the step, as a share of the displacement.
_ROUNDED = 0.25

_OWN_KEYS = frozenset(STATE_KEYS)


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
        0: nothing; 1: all of it. 0 also where it cannot be asked: the optimizer has no learning rate or has step hooks,
        communicates, or cannot be copied.
    """
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x.device, x.dtype)
    size = torch.linalg.vector_norm(x) / x.numel() ** 0.5
    moved = x + _DISPLACED * (x + size * noise)
    devices = [x.device] if x.is_cuda else []
    try:
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"), _Alone():  # type: ignore[no-untyped-call]
            seeds = torch.get_rng_state()
            here = _after_a_step(optimizer, group, parameter, x, g)
            torch.set_rng_state(seeds)
            there = _after_a_step(optimizer, group, parameter, moved, g)
    except Exception:  # whatever a copy of an unknown optimizer may raise: nothing is known then
        return 0.0
    displacement = (moved.double() - x.double()).flatten()
    rest = (there.double() - here.double()).flatten()
    if torch.linalg.vector_norm(here.double()) * torch.finfo(x.dtype).eps > _ROUNDED * displacement.norm():
        return 0.0  # such a step, of a momentum say, rounds the displacement away
    share = float(1.0 - (rest @ displacement) / (displacement @ displacement))
    return share if share == share else 0.0


def _after_a_step(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """Where a copy of the optimizer, of one parameter that is at ``x``, takes it."""
    held = vars(optimizer)
    if not held.keys() >= {"state", "param_groups"} or has_step_hooks(optimizer) or group.get("lr") is None:
        raise _CannotCopy
    stand_in: Tensor = nn.Parameter(x.detach().clone())
    stand_in.grad = g.detach().clone()
    # Wherever else the optimizer holds parameters, the copy finds tensors without elements and gradient.
    memo: dict[int, Any] = {
        id(p): nn.Parameter(x.new_empty(0)) for one in optimizer.param_groups for p in one["params"]
    }
    memo[id(parameter)] = stand_in
    skipped = ("state", "param_groups", "step")  # a scheduler puts a step in the place of the class's
    twin = object.__new__(type(optimizer))
    memo[id(optimizer)] = twin
    vars(twin).update(copy.deepcopy({name: value for name, value in held.items() if name not in skipped}, memo))
    state = {
        key: local_storage(value) if isinstance(value, Tensor) else value  # as plain as the stand-in
        for key, value in optimizer.state.get(parameter, {}).items()
        if key not in _OWN_KEYS
    }
    twin.state = defaultdict(dict, {stand_in: copy.deepcopy(state, memo)} if state else {})
    settings = {key: value for key, value in group.items() if key not in ("params", GROUP_KEY)}
    twin.param_groups = [{**copy.deepcopy(settings, memo), "lr": group["lr"] * _SLOW, "params": [stand_in]}]
    twin.step()
    return stand_in.detach()
