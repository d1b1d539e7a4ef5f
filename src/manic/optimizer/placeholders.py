"""State that base optimizers create for checkpointing alone, before a run begins.

``torch.distributed.checkpoint`` asks a fresh optimizer for the names and shapes of its state by a step with zero
gradients. The state that this leaves counts a step too many; here it is distinguished from real state.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from manic.distributed.parts import plain_parts
from manic.optimizer.joint import parameter_states

__all__ = ["Placeholders"]


class Placeholders:
    """Which base optimizers' state is a placeholder.

    Args:
        optimizers: The base optimizers.
        own_keys: Names of the wrapper's tensors under a parameter.
    """

    def __init__(self, optimizers: Sequence[Optimizer], own_keys: Sequence[str]) -> None:
        self._optimizers, self._own_keys = optimizers, own_keys
        # Those that came with a state keep theirs.
        self._came_with_state = [bool(base.state) for base in optimizers]
        self._which = [not came for came in self._came_with_state]
        self._created: list[dict[Any, Any] | None] = [None for _ in optimizers]
        # What bases have counted besides their state: where, its key, the value before and after.
        self._counts: list[tuple[dict[str, Any], str, Any, Any]] = []
        self.exist = False
        """Whether there are any."""

    def create(self, hidden: AbstractContextManager[None]) -> None:
        """Let base optimizers without a state create it, inside of ``hidden``, which hides ours from them."""
        with hidden:
            self._which = [not optimizer.state for optimizer in self._optimizers]
            for optimizer, is_placeholder in zip(self._optimizers, self._which):
                if is_placeholder:
                    before = [_plain_entries(each) for each in _counters(optimizer)]
                    self.exist = True
                    try:
                        optimizer.step()
                    finally:
                        self._note_counts(optimizer, before)
        self._created = [
            self._imprint(optimizer) if is_placeholder else None
            for optimizer, is_placeholder in zip(self._optimizers, self._which)
        ]

    def clear(self) -> None:
        """Drop them; the base optimizers make their state again at their first step."""
        for optimizer, is_placeholder in zip(self._optimizers, self._which):
            if self.exist and is_placeholder:
                optimizer.state.clear()
        for entries, key, before, after in self._counts:
            if _same(entries.get(key, _ABSENT), after):  # otherwise somebody else has set it since
                if before is _ABSENT:
                    entries.pop(key, None)
                else:
                    entries[key] = before
        self._counts.clear()
        self.exist = False

    def loaded(self) -> None:
        """A checkpoint was loaded that says that there are some."""
        self.exist = True
        self._which = [
            # Entries may be gone: FSDP1 loads none of a parameter that this rank holds nothing of. But a checkpoint of
            # the base alone may have been read into what was created, and left the tuner as it was.
            not came_with_state and (created is None or self._imprint(optimizer).items() <= created.items())
            for optimizer, came_with_state, created in zip(self._optimizers, self._came_with_state, self._created)
        ]

    def _note_counts(self, optimizer: Optimizer, before: Sequence[dict[str, Any]]) -> None:
        for entries, old in zip(_counters(optimizer), before):
            for key, value in _plain_entries(entries).items():
                if not _same(value, old.get(key, _ABSENT)):
                    self._counts.append((entries, key, old.get(key, _ABSENT), value))

    def _imprint(self, optimizer: Optimizer) -> dict[Any, Any]:
        """What tells a base's state that a step with zero gradients made from one that has seen training."""
        return {
            (parameter, name): [
                part.item() if part.numel() == 1 else int(part.count_nonzero()) for part in plain_parts(value)
            ]
            for _, parameter, state in parameter_states([optimizer])
            for name, value in state.items()
            if name not in self._own_keys and isinstance(value, Tensor)
        }


_ABSENT = object()


def _counters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Where a base may count its steps besides its state: in its attributes, and in its param groups."""
    return [vars(optimizer), *optimizer.param_groups]


def _plain_entries(entries: dict[str, Any]) -> dict[str, Any]:
    """Numbers, and copies of tensors of one element."""
    return {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in entries.items()
        if isinstance(value, (bool, int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
    }


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool((one == other).all())
    return type(one) is type(other) and bool(one == other)
