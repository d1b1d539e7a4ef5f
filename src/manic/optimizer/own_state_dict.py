"""Base optimizers with a state dict of their own: with other entries than torch's, overridden or added by hooks."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

__all__ = ["extra_entries", "has_own_state_dict"]

_TORCHS = ("state", "param_groups")


def has_own_state_dict(optimizer: Optimizer) -> bool:
    """Whether ``optimizer.state_dict()`` is not torch's alone, so that it has to be called."""
    # torch has no public way to ask for hooks; tests/optimizer/test_own_state_dict.py fails if they are renamed.
    hooks = ("_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks")
    return (
        type(optimizer).state_dict is not Optimizer.state_dict
        or "state_dict" in vars(optimizer)
        or any(getattr(optimizer, name, None) for name in hooks)
    )


def extra_entries(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The entries of a state dict besides the state and the param groups."""
    return {key: value for key, value in state_dict.items() if key not in _TORCHS}
