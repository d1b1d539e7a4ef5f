"""Which optimizers can be wrapped, and why the others cannot.

It knows optimizers by their classes, groups and parameters, and nothing of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from manic.optimizer.wrapper import OptimizerWrapper

__all__ = ["check_bases"]

# By the name of a class in torch.optim.
_UNSUPPORTED = {
    "LBFGS": "it is no first-order optimizer: a step evaluates the loss at many points",
    "SparseAdam": "its gradients are sparse; use Adam with dense gradients",
}


def check_bases(optimizers: Sequence[Optimizer], may_be_empty: bool) -> None:
    """Raise unless Mechanic can wrap ``optimizers``.

    Args:
        optimizers: Over disjoint parameters, to share one scale.
        may_be_empty: Whether they may hold nothing that is trained, as a rank of ZeRO may.

    Raises:
        TypeError: if one is no optimizer, or of a kind that cannot be scaled, or holds complex parameters.
        ValueError: if there is none, a setting cannot be kept, a parameter is there twice, or nothing is to be trained.
    """
    if not optimizers:
        raise ValueError("Mechanic needs at least one optimizer to wrap, got an empty list")
    seen: set[int] = set()
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Mechanic wraps torch.optim.Optimizer objects, got {type(optimizer).__name__}")
        if isinstance(optimizer, OptimizerWrapper):
            raise TypeError("the optimizer is a Mechanic already; wrap the base optimizer once")
        for cls in type(optimizer).__mro__:
            if cls.__module__.startswith("torch.optim") and cls.__name__ in _UNSUPPORTED:
                raise TypeError(f"Mechanic cannot wrap {cls.__name__}: {_UNSUPPORTED[cls.__name__]}")
            if cls.__name__ == "ZeroRedundancyOptimizer":
                raise TypeError(
                    "Mechanic goes inside of ZeroRedundancyOptimizer: pass "
                    'optimizer_class=mechanize(AdamW, plain="sharded")'
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
