"""What a step may leave behind: all of its state if it is committed, and none of it if not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch.optim import Optimizer

from manic.distributed.layout import local
from manic.optimizer.fit import remove_own
from manic.optimizer.kinds import is_known
from manic.optimizer.names import STATE_KEYS, X_REF

__all__ = ["Transaction", "hidden", "transaction"]


class Transaction:
    """A step under way."""

    def __init__(self) -> None:
        self._is_committed = False

    def commit(self) -> None:
        """The step was taken."""
        self._is_committed = True

    def is_committed(self) -> bool:
        """Whether it was."""
        return self._is_committed


@contextmanager
def transaction(optimizers: Sequence[Optimizer], is_first: bool, restore: Callable[[], None]) -> Iterator[Transaction]:
    """Of a step that is not committed, remove the state that it has made: half of one would be taken for a whole one.

    Parameters whose x_ref it has made are at x_ref then.

    Args:
        optimizers: The base optimizers, whose state has ours in it.
        is_first: It is the first step of the run, so that it has made every x_ref.
        restore: Called after an error, to restore what else the step has changed.
    """
    known = {id(parameter) for optimizer in optimizers for parameter in optimizer.state}
    step = Transaction()
    try:
        yield step
    except BaseException:
        if not step.is_committed():
            restore()
        raise
    finally:
        if not step.is_committed():
            _forget(optimizers, known, is_first)


def _forget(optimizers: Sequence[Optimizer], known: set[int], is_first: bool) -> None:
    for optimizer in optimizers:
        for parameter, state in list(optimizer.state.items()):
            is_new = id(parameter) not in known
            if not (is_new or is_first) or not isinstance(state, dict):
                continue
            if X_REF in state and state[X_REF].shape == parameter.shape:  # where it was when the step made it
                local(parameter).copy_(local(state[X_REF]))
            remove_own(state)
            if is_new:
                del optimizer.state[parameter]


@contextmanager
def hidden(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Show base optimizers no state of ours: many initialise theirs where they find none, or as many entries as none.

    Those of ``torch.optim`` do so where they find none at all, so ours is hidden from them only where they have none.
    """
    own = set(STATE_KEYS)
    ours = [
        (optimizer.state, parameter, {key: state[key] for key in STATE_KEYS if key in state}, state)
        for optimizer in optimizers
        for is_unknown in (not is_known(optimizer),)
        for parameter, state in optimizer.state.items()
        if isinstance(state, dict) and (state.keys() <= own or (is_unknown and not own.isdisjoint(state)))
    ]

    def show() -> None:
        for states, parameter, mine, _ in ours:
            states.setdefault(parameter, {}).update(mine)

    try:
        try:
            for states, parameter, mine, state in ours:
                if len(state) == len(mine):
                    del states[parameter]
                else:
                    remove_own(state)
            yield
        finally:
            show()
    except BaseException:
        show()  # once more: an interrupt may have come between its lines
        raise
