"""Whether parameters are where their state says, and equal where ranks hold copies: compared over all ranks.

It reads the state between steps, and changes nothing but what is yet to be compared.
"""

from __future__ import annotations

import torch

from manic.distributed import drift
from manic.distributed.collectives import raise_together
from manic.distributed.layout import local
from manic.optimizer.fit import first_misfit
from manic.optimizer.names import DELTA, X_REF, describe, short_name
from manic.optimizer.state import MechanicState
from manic.step.position import displaced

__all__ = ["compare_exchanged", "compare_loaded", "raise_if_drifted"]


def compare_exchanged(state: MechanicState) -> None:
    """Refuse parameters, in the middle of a run, whose state is another's or does not tell where they are.

    Raises:
        ValueError: on every rank alike.
    """
    if not state.started:
        return
    raise_together(ValueError, first_misfit(state.optimizers), state.layout.group, state.communication_device)
    if not state.was_loaded:
        _raise_if_displaced(
            state,
            ValueError,
            "parameters were exchanged or added since the last step, and these are not where their state says. If "
            "that is on purpose, call rebase() before the step",
        )


def compare_loaded(state: MechanicState) -> None:
    """Refuse a loaded state that the parameters do not belong to: the step would move them to where it says.

    Raises:
        ValueError: on every rank alike, if one was loaded and they are elsewhere, or it lacks references.
    """
    if state.was_loaded:
        state.loaded.check(state.groups, state.layout.group, state.communication_device)
        _raise_if_displaced(
            state,
            ValueError,
            "they are not where the loaded optimizer state says. Load the model from the same checkpoint; read a "
            "checkpoint of the base optimizer alone before the first step, or by load_state_dict; if the "
            "parameters were changed on purpose, call rebase() before the step",
        )
        state.was_loaded = False


def raise_if_drifted(state: MechanicState) -> None:
    """Raise on every rank if ranks that should hold the same do not, or parameters are displaced.

    Raises:
        RuntimeError: with the first difference in words.
    """
    absent = torch.empty(0, device=state.home_device)
    own = [*((short_name(reference), reference) for reference in state.references.names), ("Delta", DELTA)]
    held = [
        (parameter, name, optimizer.state.get(parameter, {}).get(key, absent) if key else parameter)
        for optimizer in state.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        for name, key in (("the value", None), *own)
    ]
    scale, device = state.tuner_state.scale, state.communication_device
    drift.raise_if_drifted(state.tensor, scale, state.groups, held, state.layout, device)
    if state.started:
        _raise_if_displaced(
            state,
            RuntimeError,
            "since the last step something else has changed them, which the next step will undo; if it was on "
            "purpose, call rebase() after such a change",
        )


def _raise_if_displaced(state: MechanicState, kind: type[Exception], advice: str) -> None:
    """Raise on every rank if parameters are not at x_ref + f * Delta (not seen where Delta is not stored)."""
    moved = [
        (parameter, own)
        for optimizer in state.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad and (own := optimizer.state.get(parameter, {})).keys() >= {X_REF, DELTA}
    ]
    places = [(local(parameter), local(own[X_REF]), local(own[DELTA])) for parameter, own in moved]
    found = displaced(places, state.position.factor, not state.tuner.moves_without_gradient)
    complaint = ""
    if found:
        complaint = (
            f"{len(found)} of {len(places)} parameters are not {state.rule.place}, the first being "
            f"{describe(moved[found[0]][0], state.groups)}: {advice}"
        )
    raise_together(kind, complaint, state.layout.group, state.communication_device)
