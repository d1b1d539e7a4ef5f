"""Mechanic as a class, for code that needs a class; mechanize(AdamW) makes one, as mechanic-pytorch does."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch.optim import Optimizer

from manic.mechanic import Mechanic

__all__ = ["MechanicClass", "is_mechanized", "mechanize"]

logger = logging.getLogger(__name__)


class MechanicClass(Mechanic):
    """A :class:`~manic.Mechanic` that builds its base optimizer, from the arguments of the base's class.

    Args:
        params: Parameters or param groups, as for the base.
        *args: Further arguments of the base.
        **kwargs: Keyword arguments of the base, and what a subclass takes out of them for itself.
    """

    BASE: ClassVar[Callable[..., Optimizer]]
    """What creates the base optimizer: a class or a function."""

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        arguments, options = self._divide(kwargs)
        super().__init__(type(self).BASE(params, *args, **arguments), **options)

    @classmethod
    def _divide(cls, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The base's keyword arguments, and Mechanic's."""
        raise NotImplementedError


def _log_scale(data: dict[str, Any]) -> None:
    scales = data["s"] if isinstance(data["s"], list) else [data["s"]]
    logger.info("(iter=%d), s_sum (global scaling): %s", data["iter_count"], " ".join(f"{s:g}" for s in scales))


def _log_steps(optimizer: Mechanic, log: Callable[[dict[str, Any]], Any], every: int) -> None:
    """Call ``log`` after each ``every`` updates of ``optimizer``; never if it is 0."""
    if every == 0:
        return

    last = optimizer._state.updates_made

    def loaded(_: Optimizer) -> None:
        nonlocal last
        last = optimizer._state.updates_made

    def hook(_: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal last
        before, last = last, optimizer._state.updates_made
        # A step that only created state for checkpointing, or was skipped, is not an update.
        if last and last != before and last % every == 0:
            log({"iter_count": last, "s": optimizer.scale.tolist()})

    optimizer.register_step_post_hook(hook)
    optimizer.register_load_state_dict_post_hook(loaded)


def mechanize(
    optimizer_class: Callable[..., Optimizer],
    *,
    log_func: Callable[[dict[str, Any]], Any] | None = None,
    log_every: int = 0,
    **options: Any,
) -> type[MechanicClass]:
    """Make a class that builds ``optimizer_class`` and wraps it in :class:`~manic.Mechanic`.

    Args:
        optimizer_class: An optimizer class, or a function that creates an optimizer. For those of torch there are
            ready-made classes, :mod:`manic.optim`.
        log_func: Called with ``{"iter_count": int, "s": float}``, or a list of floats with a scale per group; default:
            ``logging`` at level info.
        log_every: Number of steps between calls; 0, the default: never. Each call is a host sync.
        **options: Options of :class:`~manic.Mechanic`. Inside ``ZeroRedundancyOptimizer``: ``plain="sharded"``.

    Returns:
        A subclass of :class:`~manic.Mechanic` that takes the arguments of ``optimizer_class``.

    Raises:
        ValueError: if ``log_every`` is negative.
        TypeError: if ``optimizer_class`` is mechanized already.
    """
    if log_every < 0:
        raise ValueError(f"log_every must be 0 or more steps, got {log_every}")
    if isinstance(optimizer_class, type) and issubclass(optimizer_class, Mechanic):
        raise TypeError(f"{optimizer_class.__name__} is mechanized already; pass the base class")
    log = log_func or _log_scale

    class Mechanized(MechanicClass):
        BASE = staticmethod(optimizer_class)

        def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(params, *args, **kwargs)
            _log_steps(self, log, log_every)

        @classmethod
        def _divide(cls, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
            return dict(kwargs), options

        def __setstate__(self, state: dict[str, Any]) -> None:
            super().__setstate__(state)
            _log_steps(self, log, log_every)

        def __reduce__(self) -> Any:
            # mechanize created the class, so unpickling calls mechanize again.
            recipe = (optimizer_class, {"log_func": log_func, "log_every": log_every, **options})
            return _rebuild, recipe, self.__getstate__()

        def __deepcopy__(self, memo: dict[int, Any]) -> Mechanic:
            result = type(self).__new__(type(self))
            memo[id(self)] = result
            result.__setstate__(copy.deepcopy(self.__getstate__(), memo))
            return result

    name = getattr(optimizer_class, "__name__", "")
    Mechanized.__name__ = Mechanized.__qualname__ = f"Mechanized{name}"
    Mechanized.__doc__ = f"{name or 'An optimizer'} with a learned scale of its learning rate."
    return Mechanized


def _rebuild(optimizer_class: Any, options: dict[str, Any]) -> Mechanic:
    cls = mechanize(optimizer_class, **options)
    return cls.__new__(cls)


def is_mechanized(optimizer: object) -> bool:
    """Whether ``optimizer`` is a :class:`~manic.Mechanic`, created by any of the ways there are."""
    return isinstance(optimizer, Mechanic)
