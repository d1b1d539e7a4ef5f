"""The check that base optimizers hold no position of their own, which they would write into the parameters.

Float32 masters, averages, slow weights: an optimizer that sets a parameter from such a copy undoes the scaled step
before it. What it holds is compared with where its first steps begin and end. It does not know how a step is scaled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from manic.distributed.collectives import on_any_rank, raise_together
from manic.distributed.layout import local_storage
from manic.optimizer.kinds import is_known
from manic.optimizer.names import GROUP_KEY, STATE_KEYS, describe
from manic.step.capture import Capture
from manic.step.shards import Shard

__all__ = ["FIRST_STEPS", "PositionCheck"]

FIRST_STEPS = 16
"""How many steps are checked: slow weights appear after the first five or ten."""

# Elements of a tensor that are compared, from its first.
_COMPARED = 1 << 20
# Elements without which nothing can be said about a tensor that is not equal.
_FEW = 8
# How far a copy may be from the way of the step, as a share of the parameter's spread.
_NEAR = 0.05
# How deep an optimizer's attributes are searched.
_DEPTH = 6


class PositionCheck:
    """Checks the first steps of optimizers whose source is not known; those of ``torch.optim`` hold none.

    Args:
        optimizers: The base optimizers.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._unknown = [optimizer for optimizer in optimizers if not is_known(optimizer)]
        self._is_needed = bool(self._unknown)
        self._steps = 0
        self._seen: set[tuple[int, str]] = set()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the optimizer has parameters of its own. Its first steps were checked, if there were any.
        return {**self.__dict__, "_seen": set(), "_steps": FIRST_STEPS if self._steps else 0}

    @property
    def are_due(self) -> bool:
        """Whether the next step is one that :meth:`raise_if_found` compares, on all ranks alike."""
        return self._is_needed and self._steps < FIRST_STEPS

    def agree(self, group: ProcessGroup | None, device: torch.device) -> None:
        """Let all ranks check if one has to. Every rank must call it."""
        self._is_needed = on_any_rank(bool(self._unknown), group, device)

    def raise_if_found(
        self,
        captures: Iterable[Capture],
        param_groups: Sequence[Mapping[str, Any]],
        group: ProcessGroup | None,
        device: torch.device,
    ) -> None:
        """Compare, after the base optimizers have stepped and before x is written.

        Args:
            captures: Of the step.
            param_groups: To name parameters by.
            group: The process group, every rank of which must call this.
            device: A device that the group's backend supports.

        Raises:
            TypeError: on every rank alike, if a base optimizer of any rank holds a position of its own.
        """
        self._steps += 1
        unknown = {id(optimizer) for optimizer in self._unknown}
        places = [
            place for capture in captures for place in capture.places() if id(place[0].optimizer) in unknown
        ]  # fmt: skip
        complaint = next((self._complaint(found, param_groups) for found in self._find(places)), "")
        raise_together(TypeError, complaint, group, device)

    def _complaint(self, found: tuple[Shard, str], param_groups: Sequence[Mapping[str, Any]]) -> str:
        shard, name = found
        return (
            f"Mechanic cannot scale {type(shard.optimizer).__name__}: its {name} is a position of "
            f"{describe(shard.parameter, param_groups)} that the optimizer keeps for itself (float32 masters, an "
            "average, slow weights), and writing it into the parameter would undo the scaled step. Switch it off: pass "
            "float32 parameters instead of masters, and average or look ahead outside of Mechanic"
        )

    def _find(self, places: Sequence[tuple[Shard, Tensor, Tensor | None]]) -> Iterator[tuple[Shard, str]]:
        by_size: dict[int, list[tuple[Shard, Tensor, Tensor | None]]] = {}
        for place in places:
            shard, x, before = place
            if shard.gradient is None or not _tells_something(x, before):
                continue
            by_size.setdefault(x.numel(), []).append(place)
            for name, tensor in _tensors(shard.optimizer.state.get(shard.parameter, {}), "state"):
                is_new = (id(shard.parameter), name) not in self._seen
                self._seen.add((id(shard.parameter), name))
                # In a storage that holds an update, a momentum may equal x; but it is there from the first step on.
                if before is None and not (is_new and self._steps > 1):
                    continue
                if _is_position(tensor, x, before, shard.gradient):
                    yield shard, name
        for optimizer in self._unknown:
            for name, tensor in _tensors(_attributes(optimizer), "attribute"):
                for shard, x, before in by_size.get(tensor.numel(), ()):
                    is_own = shard.optimizer is optimizer and before is not None
                    if is_own and _is_copy(tensor, x, shard.gradient):
                        yield shard, name


def _tells_something(x: Tensor, before: Tensor | None) -> bool:
    """Whether the parameter's elements differ, and are not only its update, as where it has started at 0."""
    start = x if before is None else before
    if start.numel() < 2 or bool(start.min() == start.max()):
        return False
    return before is None or not _equals(x - before, x)


def _attributes(optimizer: Optimizer) -> dict[str, Any]:
    """What an optimizer holds besides its state and parameters."""
    known = ("state", "param_groups", "defaults")
    held = {name: value for name, value in vars(optimizer).items() if name not in known}
    skipped = ("params", GROUP_KEY)
    groups = [{key: value for key, value in group.items() if key not in skipped} for group in optimizer.param_groups]
    return {**held, "param_groups": groups}


def _tensors(value: Any, name: str, depth: int = _DEPTH) -> Iterator[tuple[str, Tensor]]:
    """Plain tensors of floating point in nested containers and optimizers, by name, without Mechanic's own."""
    if isinstance(value, Tensor):
        tensor = local_storage(value)
        if type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_floating_point():
            yield name, tensor.detach()
    elif depth == 0:
        return
    elif isinstance(value, Optimizer):
        inner = {**_attributes(value), "param_groups": value.param_groups, "state": list(value.state.values())}
        yield from _tensors(inner, name, depth)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            if not isinstance(key, Tensor) and key not in STATE_KEYS:
                yield from _tensors(each, f"{name}[{key!r}]", depth - 1)
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            yield from _tensors(each, f"{name}[{index}]", depth - 1)


def _is_position(tensor: Tensor, x: Tensor, before: Tensor | None, gradient: Tensor) -> bool:
    """Whether ``tensor`` is where the step begins or ends, or on the line through both, and is no gradient."""
    if tensor.numel() != x.numel():
        return before is not None and _is_sample(tensor, before)
    if _is_copy(tensor, x, gradient):
        return True
    if before is None or tensor.data_ptr() == x.data_ptr():
        return False
    return _is_copy(tensor, before, gradient) or _tracks(tensor, x, before)


def _is_copy(tensor: Tensor, x: Tensor, gradient: Tensor | None) -> bool:
    """Whether ``tensor`` equals ``x`` in a storage of its own, and is not the gradient."""
    if tensor.data_ptr() == x.data_ptr() or not _equals(tensor, x):
        return False
    return gradient is None or not _equals(tensor, gradient)


def _is_sample(tensor: Tensor, before: Tensor) -> bool:
    """Whether ``tensor`` is every k-th element."""
    count, total = tensor.numel(), before.numel()
    if tensor.ndim != 1 or count < _FEW or total <= count:
        return False
    sample = before.reshape(-1)[:: -(-total // count)]
    return sample.numel() == count and _equals(tensor, sample)


def _equals(tensor: Tensor, other: Tensor) -> bool:
    """Whether elements are equal in the dtype of ``other``."""
    one, two = _compared(tensor), _compared(other)
    return one.numel() == two.numel() and torch.equal(one.to(two.device, two.dtype), two)


def _tracks(tensor: Tensor, x: Tensor, before: Tensor) -> bool:
    """Whether ``tensor`` is near the line through ``before`` and ``x``, where 0 is not."""
    t, end, start = (_compared(each).to(before.device, torch.float64) for each in (tensor, x, before))
    spread = float((start - start.mean()).norm())

    def distance(point: Tensor) -> float:
        step, offset = end - start, point - start
        share = (offset @ step) / (step @ step).clamp(min=torch.finfo(torch.float64).tiny)
        return float((offset - share * step).norm())

    return t.numel() >= _FEW and distance(t) <= _NEAR * spread and distance(torch.zeros_like(t)) > 0.5 * spread


def _compared(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)[:_COMPARED]
