"""The check that base optimizers hold no position of their own, which they would write into the parameters.

Float32 masters, averages, slow weights: an optimizer that sets a parameter from such a copy undoes the scaled step
before it. What it holds is compared with where its first steps begin and end; and a copy of it is asked whether it
moves a displaced parameter back. It does not know how a step is scaled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from manic.distributed.collectives import on_any_rank, raise_together
from manic.distributed.layout import local_storage
from manic.optimizer.displaced import ChangedByACopyError, share_moved_back
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
# Elements whose values are told apart.
_VALUES = 1 << 12
# How far a copy may be from the way of the step, as a share of the parameter's spread.
_NEAR = 0.05
# The steps before which a copy is asked: state is there from the second on, and a sum of steps weighs most in the last.
_ASKED = (1, FIRST_STEPS - 1)
# From which share of a displacement on it counts as moved back; weight decay that ignores the learning rate is below.
_MOVED_BACK = 0.2
# How deep an optimizer's attributes are searched, and how many things in them.
_DEPTH = 6
_THINGS = 100_000

_OWN_KEYS = frozenset((*STATE_KEYS, GROUP_KEY))

Place = tuple[Shard, Tensor, Tensor | None]
"""A shard, its storage as the base optimizer left it, and x_t where there is a copy."""


class PositionCheck:
    """Checks the first steps of optimizers whose source is not known; those of ``torch.optim`` hold none.

    Args:
        optimizers: The base optimizers.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._unknown = [optimizer for optimizer in optimizers if not is_known(optimizer)]
        self._is_needed = bool(self._unknown)
        self._steps = 0
        self._asked = ""
        self._seen: set[tuple[int, str]] = set()
        self._is_varied: dict[int, bool] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the optimizer has parameters of its own. Its first steps were checked, if there were any.
        return {**self.__dict__, "_seen": set(), "_is_varied": {}, "_steps": FIRST_STEPS if self._steps else 0}

    @property
    def are_due(self) -> bool:
        """Whether the next step is one that :meth:`raise_if_found` compares, on all ranks alike."""
        return self._is_needed and self._steps < FIRST_STEPS

    def agree(self, group: ProcessGroup | None, device: torch.device) -> None:
        """Let all ranks check if one has to. Every rank must call it."""
        self._is_needed = on_any_rank(bool(self._unknown), group, device)

    def ask(self, captures: Iterable[Capture], param_groups: Sequence[Mapping[str, Any]]) -> None:
        """Let copies of the optimizers step from displaced parameters; :meth:`raise_if_found` raises what they tell.

        Of each param group one parameter is asked for, a small matrix if there is one. Neither parameters nor
        optimizers are changed.

        Args:
            captures: Of the step, before the base optimizers have stepped.
            param_groups: To name parameters by.
        """
        self._asked = ""
        if self._steps not in _ASKED:
            return
        try:
            self._asked = self._answer(captures, param_groups)
        except Exception:  # of an unknown optimizer, on this rank alone perhaps: nothing is known then
            self._asked = ""

    def _answer(self, captures: Iterable[Capture], param_groups: Sequence[Mapping[str, Any]]) -> str:
        chosen: dict[int, Shard] = {}
        for shard in sorted((each for capture in captures for each in capture.shards), key=_rank_to_ask):
            if any(shard.optimizer is each for each in self._unknown) and self._can_ask(shard):
                chosen.setdefault(id(shard.group), shard)
        for shard in chosen.values():
            assert shard.gradient is not None
            x, g, name = shard.x, shard.gradient, type(shard.optimizer).__name__
            try:
                share = share_moved_back(shard.optimizer, dict(shard.group), shard.parameter, x, g)
            except ChangedByACopyError:
                return (
                    f"Mechanic cannot scale {name}: the step of a copy of it has changed its own parameters or state, "
                    "which are not as before the step now. It keeps itself, or what it changes, where no copy of it "
                    "does: in a class, in a module, or in an object that is not copied. Keep these in attributes of "
                    "the optimizer, and load the last checkpoint"
                )
            if share > _MOVED_BACK:
                return (
                    f"Mechanic cannot scale {name}: its next step would move "
                    f"{describe(shard.parameter, param_groups)} back by {share:.0%} of a displacement, whatever the "
                    "learning rate. It computes the position anew from what it has summed, or projects it, and so "
                    "undoes the scaled steps. Use an optimizer that adds its update to the parameter"
                )
        return ""

    def _can_ask(self, shard: Shard) -> bool:
        x, g = shard.x, shard.gradient
        if g is None or shard.keeps_place or not (_is_comparable(x) and _is_comparable(g)):
            return False
        return _FEW <= x.numel() <= _COMPARED and _has_many_values(x)

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
        try:
            complaint = next((self._complaint(found, param_groups) for found in self._find(places)), "")
        except Exception:  # other ranks wait, and what cannot be compared is not known to be a position
            complaint = ""
        raise_together(TypeError, complaint or self._asked, group, device)

    def _complaint(self, found: tuple[Shard, str], param_groups: Sequence[Mapping[str, Any]]) -> str:
        shard, name = found
        return (
            f"Mechanic cannot scale {type(shard.optimizer).__name__}: its {name} is a position of "
            f"{describe(shard.parameter, param_groups)} that the optimizer keeps for itself (float32 masters, an "
            "average, slow weights, the start). Mechanic moves the parameter and not that, so the optimizer's next "
            "step would undo it. Switch it off: pass float32 parameters instead of masters, and average or look ahead "
            "outside of Mechanic"
        )

    def _find(self, places: Sequence[Place]) -> Iterator[tuple[Shard, str]]:
        telling = [place for place in places if self._tells(*place)]
        for shard, x, before in telling:
            for name, tensor in _tensors(shard.optimizer.state.get(shard.parameter, {}), "state"):
                is_new = (id(shard.parameter), name) not in self._seen
                self._seen.add((id(shard.parameter), name))
                # In a storage that holds an update, a momentum may equal x; but it is there from the first step on.
                if before is None and not (is_new and self._steps > 1):
                    continue
                if _is_position(tensor, x, before, shard.gradient):
                    yield shard, name
        of_parameter = {id(place[0].parameter): place for place in places}
        for optimizer in self._unknown:
            mine = [place for place in telling if place[0].optimizer is optimizer]
            groups = [[of_parameter.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
            for name, tensor in _tensors(_attributes(optimizer), "attribute"):
                for place in mine:
                    if _is_moved_copy(tensor, *place):
                        yield place[0], name
            flat = [*_tensors(_attributes(optimizer), "attribute"), *_tensors(list(optimizer.state.values()), "state")]
            for name, tensor in flat:
                for first in range(len(groups)):
                    found = _flat_copy(tensor, [place for group in groups[first:] for place in group], mine)
                    if found is not None:
                        yield found, name

    def _tells(self, shard: Shard, x: Tensor, before: Tensor | None) -> bool:
        """Whether it means something that a tensor equals this parameter.

        It does not where the parameter has begun with one or two different values, as ones, masks and unit matrices do:
        state begins so, too. Nor where it is nothing but its update.
        """
        key = id(shard.parameter)
        if key not in self._is_varied:
            self._is_varied[key] = _has_many_values(x if before is None else before)
        is_update = before is not None and _equals(x - before, x)
        return shard.gradient is not None and self._is_varied[key] and not is_update


def _rank_to_ask(shard: Shard) -> tuple[bool, int]:
    """Matrices first, since vectors are often left out of projections; and small ones."""
    return shard.parameter.ndim < 2, shard.x.numel()


def _attributes(optimizer: Optimizer) -> dict[str, Any]:
    """What an optimizer holds besides its state and parameters."""
    known = ("state", "param_groups", "defaults")
    held = {name: value for name, value in vars(optimizer).items() if name not in known}
    skipped = ("params", GROUP_KEY)
    groups = [{key: value for key, value in group.items() if key not in skipped} for group in optimizer.param_groups]
    return {**held, "param_groups": groups}


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Plain tensors of floating point in nested containers, modules, objects and optimizers, without Mechanic's own."""
    seen: set[int] = set()
    things = [(value, name, _DEPTH)]
    while things and len(seen) < _THINGS:
        value, name, depth = things.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if issubclass(type(value), Tensor):  # isinstance() may run code of the object
            tensor = local_storage(value)
            if _is_comparable(tensor):
                yield name, tensor.detach()
        elif depth > 0:
            try:
                things += reversed([(each, f"{name}[{key!r}]", depth - 1) for key, each in _inside(value)])
            except Exception:  # whatever an unknown object raises where it is looked at
                continue


def _is_comparable(tensor: Tensor) -> bool:
    is_plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
    return is_plain and tensor.is_floating_point() and tensor.untyped_storage().size() > 0


def _inside(value: Any) -> Iterable[tuple[Any, Any]]:
    """What a container, module, optimizer or other object holds, by name."""
    if isinstance(value, Optimizer):
        return [*_attributes(value).items(), ("params", value.param_groups), ("state", list(value.state.values()))]
    if isinstance(value, torch.nn.Module):
        return [*value.named_parameters(), *value.named_buffers()]
    if isinstance(value, Mapping):
        pairs = enumerate(value.items())
        return [(index if isinstance(key, Tensor) else key, x) for index, (key, x) in pairs if key not in _OWN_KEYS]
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    is_object = hasattr(value, "__dict__") and not isinstance(value, (type, ModuleType)) and not callable(value)
    return list(vars(value).items()) if is_object else []


def _is_position(tensor: Tensor, x: Tensor, before: Tensor | None, gradient: Tensor | None) -> bool:
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
    return sample.numel() == count and _has_many_values(sample) and _equals(tensor, sample)


def _has_many_values(tensor: Tensor) -> bool:
    """Whether there are more than two different ones."""
    ordered = _compared(tensor)[:_VALUES].sort().values
    return int((ordered[1:] != ordered[:-1]).sum()) > 1


def _is_moved_copy(tensor: Tensor, shard: Shard, x: Tensor, before: Tensor | None) -> bool:
    """Whether ``tensor`` is where the step has taken the parameter: a copy that has moved with it."""
    if before is None or tensor.numel() != x.numel() or _equals(before, x):
        return False
    return _is_copy(tensor, x, shard.gradient)


def _flat_copy(tensor: Tensor, places: Sequence[Place | None], telling: Sequence[Place]) -> Shard | None:
    """The first shard that tells, if ``tensor`` is the shards one after the other; it may be longer, or shorter."""
    if tensor.ndim != 1:
        return None
    start, first, told = 0, None, {id(place[0]) for place in telling}
    for place in places:
        if place is None:
            return None
        shard, x, before = place
        part = tensor[start : start + x.numel()]
        if part.numel() < x.numel():
            break
        if not _equals(part, x):
            return None
        start += x.numel()
        if first is None and id(shard) in told and before is not None and not _equals(before, x):
            first = shard if part.data_ptr() != x.data_ptr() else None
    return first if start > 0 else None


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
