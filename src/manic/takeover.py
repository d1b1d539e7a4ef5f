"""Conversion of a mechanic-pytorch 0.0.1 state dict, so that Mechanic continues its run.

Reads the package's state under ``"_mechanic"`` without importing the package.
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
# The tuner's fields, and the package's names for them.
_ROWS = {"r": "reward", "m": "max_product", "v": "sum_squared_products", "s": "s"}


def from_mechanic_pytorch(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert the state dict of a mechanic-pytorch 0.0.1 optimizer to one for :class:`~manic.Mechanic`.

    ``state_dict`` may come from the optimizer or from a file of ``torch.save(optimizer.state_dict(), path)``, which
    ``torch.load`` reads with ``weights_only=True``. (The package cannot continue from such a file: its state is keyed
    by the parameter objects of the run that saved it. This function uses only their order.)

    Load the model's parameters as well: x continues from their values. With the returned options the run continues
    exactly up to rounding: the package stores its tuner in torch's default dtype, and Delta in the parameters' dtype;
    Mechanic stores the tuner in float64 and Delta in at least float32.

    * ``betas``, ``s_init``, ``s_decay`` and ``eps`` are the values that the package computed with, all except ``eps``
      rounded to its tuner's dtype: 0.9 is 0.8999999762 in float32. Mechanic does not save the last three; pass the same
      values whenever that run continues.
    * ``store_delta`` is the run's setting. With ``False``, the package's default, the package recomputes Delta in each
      step from x, x_ref and S; only ``store_delta=False`` does the same. ``True`` starts from the same Delta and
      stores it.

    Args:
        state_dict: ``optimizer.state_dict()`` after at least one step. It is not changed.

    Returns:
        The state dict, and the keyword arguments with which Mechanic loads it and continues equally. The base
        optimizer's state and groups are unchanged. Added are, for each parameter with a displacement,
        ``mechanic_x_ref`` and, if the run stored it, ``mechanic_delta``, of the parameter's shape and dtype; and in
        each group ``mechanic``, float64 [9, number of betas], on the CPU. Tensors are shared with ``state_dict``: copy
        it first if the old run continues too.

    Raises:
        ValueError: if ``state_dict`` is not a state dict of such an optimizer, or Mechanic does not accept its
            settings.
    """
    kept = _mechanic_state(state_dict)
    groups = state_dict["param_groups"]
    indices = [index for group in groups for index in group["params"]]
    references = {key: value for key, value in kept.items() if isinstance(key, Tensor)}
    if len(references) != len(indices):
        raise ValueError(
            f"the mechanic-pytorch state has reference points of {len(references)} parameters, but the param groups "
            f"have {len(indices)}. Expected one for each, in the same order; pass the whole optimizer.state_dict() of "
            "after a step, as torch.save stores it (other formats may lose keys that are tensors)"
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
        # Without a gradient so far a parameter has no base state, and a base optimizer expects its keys in any state.
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
    """The package's state in ``state_dict``; ValueError unless it is complete."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        found = list(state_dict)[:5] if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(
            f"not an optimizer's state dict: expected a mapping with 'state' and 'param_groups', got {found}; pass "
            "optimizer.state_dict(), or that part of a checkpoint"
        )
    if _KEY not in state_dict["state"]:
        raise ValueError(
            f"not a state dict of mechanic-pytorch: expected {_KEY!r} in its 'state', where that package's mechanize "
            "stores it in the first step. Load the state dict of any other optimizer into Mechanic directly"
        )
    kept: Mapping[Any, Any] = state_dict["state"][_KEY]
    missing = [name for name in ("betas", *_SETTINGS, *_ROWS.values(), "iter_count") if name not in kept]
    if missing:
        raise ValueError(
            f"the mechanic-pytorch state lacks {missing}: expected the state of version 0.0.1; pass that version's "
            "state dict unchanged"
        )
    return kept


def _has_moved(x: Tensor, reference: Mapping[str, Tensor]) -> bool:
    """Whether a parameter has a displacement or a Delta that a restart from ``x`` would lose."""
    moved = bool((x != reference["ref"]).any())
    return moved or ("delta" in reference and bool(reference["delta"].any()))
