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
        self.exist = False
        """Whether there are any."""

    def create(self, hidden: AbstractContextManager[None]) -> None:
        """Let base optimizers without a state create it, inside of ``hidden``, which hides ours from them."""
        with hidden:
            self._which = [not optimizer.state for optimizer in self._optimizers]
            for optimizer, is_placeholder in zip(self._optimizers, self._which):
                if is_placeholder:
                    optimizer.step()
                    self.exist = True
        self._created = [
            self._imprint(optimizer) if is_placeholder else None
            for optimizer, is_placeholder in zip(self._optimizers, self._which)
        ]

    def clear(self) -> None:
        """Drop them; the base optimizers make their state again at their first step."""
        for optimizer, is_placeholder in zip(self._optimizers, self._which):
            if self.exist and is_placeholder:
                optimizer.state.clear()
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

    def _imprint(self, optimizer: Optimizer) -> dict[Any, Any]:
        """What tells a base's state that a step with zero gradients made from one that has seen training."""
        return {
            (parameter, name): [
                part.item() if part.numel() == 1 else int(part.count_nonzero()) for part in plain_parts(value)
            ]
            for parameter, state in optimizer.state.items()
            for name, value in state.items()
            if name not in self._own_keys and isinstance(value, Tensor)
        }
