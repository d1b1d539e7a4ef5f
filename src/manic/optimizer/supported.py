"""The check that a base optimizer can be wrapped, by its class, param groups and parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from manic.optimizer.wrapper import OptimizerWrapper

__all__ = ["check_bases"]

# Reason by the name of a class in torch.optim.
_UNSUPPORTED = {
    "LBFGS": "a step evaluates the loss at many points",
    "SparseAdam": "its gradients are sparse; use Adam with dense gradients",
}


def check_bases(optimizers: Sequence[Optimizer], may_be_empty: bool) -> None:
    """Raise if Mechanic cannot wrap ``optimizers``.

    Args:
        optimizers: The base optimizers, over disjoint parameters; they share one scale.
        may_be_empty: Whether they may have no trainable parameter, as on a rank of ZeRO.

    Raises:
        TypeError: if one is not an optimizer, is of an unsupported class, or has complex parameters.
        ValueError: if the list is empty, a setting is unsupported, a parameter is in two groups, or no parameter is
            trainable.
    """
    if not optimizers:
        raise ValueError("Mechanic needs at least one optimizer to wrap, got an empty list")
    seen: set[int] = set()
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Mechanic wraps torch.optim.Optimizer objects, got {type(optimizer).__name__}")
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
        if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
            raise TypeError(
                f"Mechanic cannot wrap {type(optimizer).__name__}: by its train() and eval() it moves the parameters "
                "between positions of its own (Schedule-Free does), which undo the scaled steps. Wrap an optimizer "
                "without averaging, with a schedule"
            )
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
