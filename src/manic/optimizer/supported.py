"""The check that a base optimizer can be wrapped, by its class, param groups and parameters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch.optim import Optimizer

from manic.optimizer.own_state_dict import has_own_state_dict
from manic.optimizer.wrapper import OptimizerWrapper

__all__ = ["check_bases", "closure_explained"]

_CLOSURE = (
    "Mechanic calls the closure once, and the base optimizer's step without one. An optimizer that evaluates the loss "
    "in its step (SAM, AliG, LBFGS) cannot be wrapped"
)

# Reason by the name of a class in torch.optim.
_UNSUPPORTED = {
    "LBFGS": "a step evaluates the loss at many points",
    "SparseAdam": "its gradients are sparse; use Adam with dense gradients",
}


def check_bases(optimizers: Sequence[Optimizer], may_be_empty: bool) -> None:
    """Raise if Mechanic cannot wrap ``optimizers``.

    Args:
        optimizers: The base optimizers, over disjoint parameters.
        may_be_empty: Whether they may have no trainable parameter, as on a rank of ZeRO.

    Raises:
        TypeError: if one is not an optimizer, is of an unsupported class, has complex parameters, or has a state dict
            of its own that cannot hold Mechanic's state.
        ValueError: if the list is empty, a setting is unsupported, a parameter is in two groups, or no parameter is
            trainable.
    """
    if not optimizers:
        raise ValueError("Mechanic needs at least one optimizer to wrap, got an empty list")
    seen: set[int] = set()
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Mechanic wraps torch.optim.Optimizer objects, got {type(optimizer).__name__}")
        if not isinstance(getattr(optimizer, "param_groups", None), list):
            raise TypeError(
                f"{type(optimizer).__name__} has no param_groups, through which Mechanic finds the parameters. If it "
                "wraps another optimizer, wrap that one in Mechanic first"
            )
        if isinstance(optimizer, OptimizerWrapper):
            raise TypeError("the optimizer is already a Mechanic; wrap the base optimizer once")
        for cls in type(optimizer).__mro__:
            if cls.__module__.startswith("torch.optim") and cls.__name__ in _UNSUPPORTED:
                raise TypeError(f"Mechanic cannot wrap {cls.__name__}: {_UNSUPPORTED[cls.__name__]}")
            if cls.__name__ == "ZeroRedundancyOptimizer":
                raise TypeError(
                    "Mechanic must be inside ZeroRedundancyOptimizer: pass "
                    'optimizer_class=mechanize(AdamW, plain="sharded")'
                )
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise TypeError(f"Mechanic cannot wrap {type(optimizer).__name__}: its step needs a closure. {_CLOSURE}")
        if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
            raise TypeError(
                f"Mechanic cannot wrap {type(optimizer).__name__}: by its train() and eval() it moves the parameters "
                "between positions of its own (Schedule-Free does), which undo the scaled steps. Wrap an optimizer "
                "without averaging, with a schedule"
            )
        if has_own_state_dict(optimizer):
            _check_state_dict(optimizer, is_alone=len(optimizers) == 1)
        for group in optimizer.param_groups:
            if group.get("differentiable", False):
                raise ValueError("differentiable=True is not supported: Mechanic's step cannot be differentiated")
            for parameter in group["params"]:
                if parameter.is_complex():
                    raise TypeError(
                        f"a parameter of shape {tuple(parameter.shape)} is complex; Mechanic needs real ones"
                    )
                if id(parameter) in seen:
                    raise ValueError(
                        f"a parameter of shape {tuple(parameter.shape)} is in more than one group; each must be in one"
                    )
                seen.add(id(parameter))
    trainable = any(p.requires_grad for base in optimizers for group in base.param_groups for p in group["params"])
    if not trainable and not may_be_empty:
        raise ValueError("no parameter requires a gradient; there is nothing to train")


@contextmanager
def closure_explained() -> Iterator[None]:
    """Add to an error of a base optimizer's step, if it asks for a closure, why there is none."""
    try:
        yield
    except Exception as error:
        if "closure" in f"{type(error).__name__} {error}".lower():
            error.add_note(_CLOSURE)
        raise


def _check_state_dict(optimizer: Optimizer, is_alone: bool) -> None:
    """Raise TypeError if ``optimizer``, which has a state dict of its own, cannot be saved by it."""
    name = type(optimizer).__name__
    if not is_alone:
        raise TypeError(
            f"{name} has a state_dict() of its own, overridden or changed by hooks, which cannot be joined with "
            f"those of other base optimizers. Wrap {name} alone, or put all parameters into its param groups"
        )
    state_dict = optimizer.state_dict()
    if not isinstance(state_dict, dict) or not state_dict.keys() >= {"state", "param_groups"}:
        raise TypeError(
            f"{name}.state_dict() has no 'state' and 'param_groups', where Mechanic would keep its own state. Wrap the "
            "optimizers inside it instead, alone or together: Mechanic([first, second])"
        )
