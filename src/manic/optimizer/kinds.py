"""What is known of a base optimizer's update: whether it depends on x, and on the learning rate in proportion.

It knows optimizers by their classes and settings, and nothing of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

__all__ = [
    "UPDATES", "decay_is_decoupled", "has_step_hooks", "is_elementwise", "is_fused", "is_known", "is_proportional",
    "keeps_place", "largest_lr", "learning_rate", "resolve_update",
]  # fmt: skip

UPDATES = ("snapshot", "decoupled", "coupled")
"""The choices of the user."""

# The optimizers whose source was read (torch 2.6 to 2.13): the update is a function of gradients and state alone,
# apart from the weight decay named here. Adafactor (scales by the parameter's RMS) and ASGD (averages parameters)
# read the position and are not among them.
_INDEPENDENT_OF_X: dict[str, Literal["decoupled", "coupled", "by group"]] = {
    "SGD": "coupled",
    "Adam": "by group",
    "AdamW": "decoupled",
    "NAdam": "by group",
    "RAdam": "by group",
    "Adamax": "coupled",
    "Adagrad": "coupled",
    "RMSprop": "coupled",
    "Adadelta": "coupled",
    "Rprop": "coupled",
    "Muon": "decoupled",
}
# In the same source, no operation takes elements from two places. Muon and Adafactor do.
_ELEMENTWISE = (_INDEPENDENT_OF_X.keys() | {"ASGD"}) - {"Muon"}


def is_known(optimizer: Optimizer) -> bool:
    """Whether ``optimizer`` is of a class of ``torch.optim`` itself; a subclass may do anything."""
    return getattr(torch.optim, type(optimizer).__name__, None) is type(optimizer)


def resolve_update(optimizer: Optimizer, update: str) -> str:
    """Find what ``optimizer``'s update depends on.

    Args:
        optimizer: A base optimizer.
        update: ``"auto"``, or ``"snapshot"``, ``"decoupled"`` or ``"coupled"`` to decide it yourself. ``"auto"`` knows
            the optimizers of ``torch.optim`` (the classes themselves; a subclass may do anything), and takes a snapshot
            for all others.

    Returns:
        ``"snapshot"`` where it depends on x; else what kind its weight decay is of: ``"decoupled"``, ``"coupled"``, or
        ``"by group"`` where each param group says it.

    Raises:
        ValueError: if ``update`` is none of these.
    """
    if update == "auto":
        return _INDEPENDENT_OF_X.get(type(optimizer).__name__, "snapshot") if is_known(optimizer) else "snapshot"
    if update not in UPDATES:
        raise ValueError(f"update must be 'auto' or one of {UPDATES}, got {update!r}")
    return update


def decay_is_decoupled(update: str, group: dict[str, Any]) -> bool:
    """Whether weight decay acts on the parameter; ``update`` is from :func:`resolve_update`."""
    return bool(group.get("decoupled_weight_decay", False)) if update == "by group" else update == "decoupled"


def is_proportional(optimizer: Optimizer) -> bool:
    """Whether ``optimizer``'s update, weight decay included, is known to be its learning rate times what is none of it.

    Rprop takes its learning rate for its first step only. A step hook may read or set learning rates, and should see
    the user's.
    """
    if resolve_update(optimizer, "auto") == "snapshot" or isinstance(optimizer, torch.optim.Rprop):
        return False
    return not has_step_hooks(optimizer)


def is_elementwise(optimizer: Optimizer) -> bool:
    """Whether ``optimizer``'s step is known to make each element from elements at the same place, and from numbers.

    A step hook, or a step that somebody has put in the place of the class's, may look at the parameters. A scheduler
    puts one there that counts calls. With ``differentiable`` the parameters' history matters, too.
    """
    if type(optimizer).__name__ not in _ELEMENTWISE or not is_known(optimizer) or has_step_hooks(optimizer):
        return False
    # The scheduler's mark is private: tests/optimizer/test_kinds.py fails if it is renamed.
    is_replaced = "step" in vars(optimizer) and not hasattr(optimizer.step, "_wrapped_by_lr_sched")
    is_differentiable = (each.get("differentiable") for each in (optimizer.defaults, *optimizer.param_groups))
    return not is_replaced and not any(is_differentiable)


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Whether functions of others run before or after its step."""
    # torch has no public way to ask for hooks; tests/optimizer/test_kinds.py fails if they are renamed.
    own = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    return any((*own, _global_optimizer_pre_hooks, _global_optimizer_post_hooks))


def is_fused(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether the param group is stepped by torch's fused kernels.

    They read a learning rate that is a tensor, and leave the step out, step counters included, where ``found_inf`` of
    the optimizer is 1.
    """
    fused = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
    return type(optimizer) in fused and bool(group.get("fused"))


def learning_rate(group: Mapping[str, Any]) -> Any:
    """A param group's learning rate: 1.0 where it has none, or ``None``, as of optimizers that make their own."""
    lr = group.get("lr")
    return 1.0 if lr is None else lr


def keeps_place(group: Mapping[str, Any]) -> bool:
    """Whether a param group stays where it is, since its learning rate is 0. One on a device is not read."""
    lr = learning_rate(group)
    return (not isinstance(lr, Tensor) or lr.is_cpu) and float(lr) == 0.0


def largest_lr(param_groups: Iterable[Mapping[str, Any]]) -> float | Tensor | None:
    """Over the param groups: a 0-dim tensor where one has it on a device, ``None`` where there are no groups."""
    lrs = [learning_rate(group) for group in param_groups]
    known = [float(lr) for lr in lrs if not isinstance(lr, Tensor) or lr.is_cpu]
    on_device = [lr.reshape(()) for lr in lrs if isinstance(lr, Tensor) and not lr.is_cpu]
    if not on_device:
        return max(known, default=None)
    largest = torch.stack(on_device).max()
    return largest.clamp(min=max(known)) if known else largest
