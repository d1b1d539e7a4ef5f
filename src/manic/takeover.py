"""Continuing a run of mechanic-pytorch 0.0.1 with manic: its state dict turned into one that Mechanic loads.

It knows what that package keeps under ``"_mechanic"``, not the package itself, and nothing of files or of a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from manic.mechanic import Mechanic
from manic.optimizer.names import DELTA, X_REF
from manic.tuners.registry import make_tuner
from manic.tuners.state import TunerState

__all__ = ["from_mechanic_pytorch"]

_KEY = "_mechanic"
_SETTINGS = ("s_init", "s_decay", "eps")
# The tuner's fields, and that package's names of them.
_ROWS = {"r": "reward", "m": "max_product", "v": "sum_squared_products", "s": "s"}


def from_mechanic_pytorch(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Turn the state dict of a mechanic-pytorch 0.0.1 optimizer into one for :class:`~manic.Mechanic`.

    ``state_dict`` may come from the optimizer itself or from a file of ``torch.save(optimizer.state_dict(), path)``,
    which ``torch.load`` reads with ``weights_only=True``. (The package's own load then fails at the next step: it looks
    its state up by the parameter objects of the run that saved it. Their order is still that of the parameters.)

    The model's parameters must be loaded as well: x goes on from where they are. A run goes on exactly with the
    returned options, up to rounding: the package keeps its tuner in torch's default dtype, and Delta in the
    parameters', where Mechanic takes float64 and at least float32.

    * ``betas``, ``s_init``, ``s_decay`` and ``eps`` are those the package calculated with, all but ``eps`` rounded to
      its tuner's dtype: 0.9 is 0.8999999762 in float32. Mechanic does not save the last three; pass the same whenever
      that run goes on.
    * ``store_delta`` is the run's. Where it is ``False``, as by default there, the package makes Delta anew in each
      step from x, x_ref and S; only ``store_delta=False`` follows it. ``True`` starts from the same Delta, which is
      then carried along.

    Args:
        state_dict: ``optimizer.state_dict()`` after at least one step. It is not changed.

    Returns:
        The state dict, and the keyword arguments that Mechanic needs to load it and go on alike. The base optimizer's
        state and groups are as they were, to which are added, for each parameter that was moved, ``mechanic_x_ref``
        and, if the run stored it, ``mechanic_delta``, of the parameter's shape and dtype; and in each group
        ``mechanic``, float64 [9, number of betas], on the CPU. Tensors are shared with ``state_dict``: copy it first
        if the old run shall go on too.

    Raises:
        ValueError: if ``state_dict`` is no state dict of such an optimizer, or its settings are none that Mechanic
            takes.
    """
    kept = _mechanic_state(state_dict)
    groups = state_dict["param_groups"]
    indices = [index for group in groups for index in group["params"]]
    references = {key: value for key, value in kept.items() if isinstance(key, Tensor)}
    if len(references) != len(indices):
        raise ValueError(
            f"the mechanic-pytorch state has reference points of {len(references)} parameters, but the param groups "
            f"have {len(indices)}. Expected is one for each, in the same order; pass what optimizer.state_dict() gave "
            "after a step, whole, as torch.save keeps it (other formats may lose keys that are tensors)"
        )

    settings: dict[str, Any] = {name: float(kept[name]) for name in _SETTINGS}
    settings["betas"] = tuple(kept["betas"].tolist())
    tuner = make_tuner("pytorch", **settings)
    state = TunerState(tuner)
    rows = tuner.rows(state.tensor)
    for row, name in _ROWS.items():
        rows[row].copy_(kept[name])
    state.updates.fill_(kept["iter_count"])

    states = {key: value for key, value in state_dict["state"].items() if key != _KEY}
    for index, (x, reference) in zip(indices, references.items()):
        # Base optimizers have no state for a parameter that had no gradient yet, and expect theirs where there is any.
        if index in states or _has_moved(x, reference):
            own = {X_REF: reference["ref"], DELTA: reference.get("delta")}
            present = {name: tensor for name, tensor in own.items() if tensor is not None}
            states[index] = {**states.get(index, {}), **present}

    options = {
        **settings,
        "variant": "pytorch",
        "store_delta": any("delta" in reference for reference in references.values()),
    }
    groups = [{**group, Mechanic.GROUP_KEY: state.tensor} for group in groups]
    return {"state": states, "param_groups": groups}, options


def _mechanic_state(state_dict: Mapping[str, Any]) -> Mapping[Any, Any]:
    """What the package keeps in ``state_dict``; ValueError unless all of it is there."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        found = list(state_dict)[:5] if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(
            f"this is no optimizer's state dict: expected a mapping with 'state' and 'param_groups', got {found}; pass "
            "optimizer.state_dict(), or that part of a checkpoint"
        )
    if _KEY not in state_dict["state"]:
        raise ValueError(
            f"this is no state dict of mechanic-pytorch: expected {_KEY!r} in its 'state', which an optimizer made by "
            "that package's mechanize has after its first step. Load the state dict of any other optimizer into "
            "Mechanic as it is"
        )
    kept: Mapping[Any, Any] = state_dict["state"][_KEY]
    missing = [name for name in ("betas", *_SETTINGS, *_ROWS.values(), "iter_count") if name not in kept]
    if missing:
        raise ValueError(
            f"the mechanic-pytorch state lacks {missing}: expected is that of version 0.0.1; pass the state dict as "
            "that version's optimizer gave it"
        )
    return kept


def _has_moved(x: Tensor, reference: Mapping[str, Tensor]) -> bool:
    """Whether anything is lost if a parameter starts anew from ``x``."""
    moved = bool((x != reference["ref"]).any())
    return moved or ("delta" in reference and bool(reference["delta"].any()))
