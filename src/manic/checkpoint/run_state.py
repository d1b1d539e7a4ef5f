"""The whole state of a run as one state dict: model, optimizers, other objects, and the random state.

It knows how torch names these things in a checkpoint, in any layout and for any optimizer, and nothing of files.
"""

from __future__ import annotations

import logging
import random
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    _get_fqns,  # the name that torch gives a parameter, without wrappers' prefixes; tests/checkpoint/test_run_state.py
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from manic.distributed.collectives import from_every_rank, on_every_rank, rank
from manic.mechanic import Mechanic

__all__ = ["RunState", "parameter_names", "split"]

logger = logging.getLogger(__name__)

# Flat, so that every value stands under its parameter's name, and ranks may own different parameters.
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)

_MECHANIC_KEYS = frozenset(Mechanic.STATE_KEYS)

Read = Callable[[dict[str, Any]], None]
"""Fills a state dict, in place where it holds tensors."""


class RunState:
    """What of a run is saved.

    Args:
        model: The model, sharded or wrapped in whatever way.
        optimizers: Its optimizers. One with a property ``own_keys`` can do without state and settings of these names;
            one with a method ``check_param_groups`` is asked with it before anything is loaded.
        objects: Whatever else has ``state_dict`` and ``load_state_dict``, the same on all ranks.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], objects: Mapping[str, Stateful]) -> None:
        self.model = model
        self.optimizers = list(optimizers)
        self.objects = dict(objects)

    def collect(self) -> dict[str, Any]:
        """The state now. Tensors are the run's own, not copies."""
        model, optimizer = get_state_dict(self.model, self._inner(), options=_FLAT)
        return {
            "model": model,
            "optimizer": {key: _number(value) for key, value in optimizer.items()},
            "objects": {name: _whole_or_flat(thing.state_dict()) for name, thing in self.objects.items()},
            "random": {str(rank()): _random_state()},
        }

    @staticmethod
    def plain_entries(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Of what :meth:`collect` gave, what is no tensor, by the keys under which DCP stores it."""
        for kind, each in state.items():
            for key, value in _entries(each, kind):
                if not isinstance(value, torch.Tensor):
                    yield key, value

    def load(self, saved: Mapping[str, Any], read: Read, name: str, group: ProcessGroup | None) -> None:
        """Load a checkpoint; what may refuse it is asked first.

        Args:
            saved: DCP's metadata of every key in the checkpoint.
            read: Reads from the checkpoint.
            name: The checkpoint's, for messages.
            group: Of all ranks, to agree over; default: the default group.

        Raises:
            ValueError: on every rank, if it is not of this run; nothing has changed then, unless it was one of the
                objects that refused.
        """
        # Of no use after a load; and while there are any, torch creates no state to load into.
        self.model.zero_grad(set_to_none=True)
        state = on_every_rank(self.collect, group)
        for optimizer in self.optimizers:
            if isinstance(optimizer, ZeroRedundancyOptimizer):
                _ask_for_groups(optimizer, parameter_names(self.model), state["optimizer"])
        own_keys = frozenset[str]().union(*(getattr(inner, "own_keys", ()) for inner in self._inner()))
        # A pipeline's ranks have different parts of the model.
        names: set[str] = set().union(*from_every_rank(set(_keys(state["model"], "model")), group))
        trainable = set().union(*(self._trainable(inner) for inner in self._inner()))

        def ask() -> tuple[dict[str, Any], dict[str, Any]]:
            _check_model(state["model"], saved, names, name)
            objects = {each: _wanted_of_object(each, value, saved, name) for each, value in state["objects"].items()}
            return _wanted_of_optimizer(state["optimizer"], saved, trainable, own_keys, name), objects

        wanted, objects = on_every_rank(ask, group)
        settings = {
            key: value
            for key, value in wanted.items()
            if key.startswith("param_groups.") or not isinstance(value, torch.Tensor)
        }
        # What an older torch, say, had no setting for stays as it is; what the wrapper has none for starts anew.
        kept = {
            key: value
            for key, value in state["optimizer"].items()
            if key.startswith("param_groups.") and key not in settings and key.rsplit(".", 1)[1] not in own_keys
        }
        asked = {"objects": objects}
        mine = state["random"][str(rank())]
        mine = {key: value for key, value in mine.items() if f"random.{rank()}.{key}" in saved}

        small = {"optimizer": settings, "random": {str(rank()): mine}}
        # What stands among tensors, which are read in place, is read before them, too: it may be refused.
        among = {name: each for name, each in objects.items() if not isinstance(each, tuple)}
        read({**small, **dict(self.plain_entries({"model": state["model"], "objects": among}))})
        on_every_rank(lambda: self._check_settings(small["optimizer"], name), group)
        read(asked)  # last of what may refuse: tensors are read in place
        on_every_rank(lambda: self._load_objects(asked["objects"]), group)

        tensors = {key: value for key, value in wanted.items() if key not in settings}
        large = {"model": state["model"], "optimizer": tensors}
        read(large)

        def apply() -> None:
            set_model_state_dict(self.model, large["model"])
            self._load_optimizers({**kept, **small["optimizer"], **large["optimizer"]})
            _set_random_state(small["random"].get(str(rank()), {}))

        on_every_rank(apply, group)

    @property
    def is_fsdp1(self) -> bool:
        """Whether some of the model's state is ShardedTensors."""
        return any(isinstance(module, FullyShardedDataParallel) for module in self.model.modules())

    def layout(self) -> dict[str, int]:
        """How the parameters are spread over the ranks, in words, and how many parameters are so."""
        wrappers = [
            cls.__name__
            for cls in (DistributedDataParallel, FullyShardedDataParallel)
            if any(isinstance(module, cls) for module in self.model.modules())
        ]
        plain = " ".join(["plain", *wrappers])
        return dict(Counter(_placement(p) or plain for p in self.model.parameters()))

    def _inner(self) -> list[Optimizer]:
        """The optimizers; of ZeRO, the one inside: ZeRO's own state dict is gathered on one rank."""
        inner = []
        for each in self.optimizers:
            if isinstance(each, ZeroRedundancyOptimizer):
                # The one inside hears of a scheduler's changes only at the next step.
                _copy_settings(each.param_groups, each.optim.param_groups)
                each = each.optim
            inner.append(each)
        return inner

    def _trainable(self, inner: Optimizer) -> set[str]:
        """The names of an optimizer's parameters that are trained."""
        names = parameter_names(self.model)
        return {names[id(p)] for group in inner.param_groups for p in group["params"] if p.requires_grad}

    def _groups(self, inner: Optimizer) -> dict[str, int]:
        """Of each parameter's name, the index of its param group; FSDP1's flat parameters have several names."""
        names = {id(p): _get_fqns(self.model, name) for name, p in self.model.named_parameters()}
        groups = enumerate(inner.param_groups)
        return {name: index for index, group in groups for p in group["params"] for name in names[id(p)]}

    def _check_settings(self, settings: Mapping[str, Any], checkpoint: str) -> None:
        each = {group["params"][0]: group for group in _nested(settings)["param_groups"]}
        for inner in self._inner():
            groups: dict[int, list[dict[str, Any]]] = {}
            for name, index in self._groups(inner).items():
                if name in each:
                    groups.setdefault(index, []).append(each[name])
            for first, *others in groups.values():
                for other in others:
                    _check_alike(first, other, checkpoint)
            check = getattr(inner, "check_param_groups", None)
            if check is not None:
                check([group for members in groups.values() for group in members])

    def _load_objects(self, states: Mapping[str, Any]) -> None:
        for name, thing in self.objects.items():
            state = states[name]
            thing.load_state_dict(state[0] if isinstance(state, tuple) else state)

    def _load_optimizers(self, flat: Mapping[str, Any]) -> None:
        for optimizer in self.optimizers:
            if isinstance(optimizer, ZeroRedundancyOptimizer):
                _load_zero(optimizer, parameter_names(self.model), flat)
            else:
                # Not strict: whatever has a state here was asked for and found, and SGD without momentum has none.
                options = StateDictOptions(strict=False)
                set_optimizer_state_dict(self.model, optimizer, _nested(flat, self._groups(optimizer)), options=options)


def parameter_names(model: nn.Module) -> dict[int, str]:
    """The name in a checkpoint of each parameter, by identity."""
    return {id(p): min(_get_fqns(model, name)) for name, p in model.named_parameters()}


def _placement(parameter: torch.Tensor) -> str | None:
    """Of a DTensor, in words."""
    if not isinstance(parameter, DTensor):
        return None
    mesh = parameter.device_mesh
    names = mesh.mesh_dim_names or ("",) * mesh.ndim
    return ", ".join(
        f"{placement!r} on {size} ranks{f' ({name})' if name else ''}"
        for placement, size, name in zip(parameter.placements, mesh.shape, names)
    )


def _check_model(model: Mapping[str, Any], saved: Mapping[str, Any], names: set[str], checkpoint: str) -> None:
    """Raise ValueError if the checkpoint is of another model; ``names`` are the keys of the whole model."""
    for name, value in model.items():
        for key in _keys(value, f"model.{name}"):
            if key not in saved:
                raise ValueError(f"{checkpoint} was saved from another model: it has no {key.removeprefix('model.')}")
        there = saved.get(f"model.{name}")
        size = None
        if isinstance(there, TensorStorageMetadata):
            size, dtype = tuple(there.size), there.properties.dtype
            if isinstance(value, torch.Tensor) and dtype != value.dtype and rank() == 0:
                logger.warning("%s holds %s in %s, the model in %s", checkpoint, name, dtype, value.dtype)
        if isinstance(value, torch.Tensor) and size != tuple(value.shape):
            raise ValueError(
                f"{checkpoint} was saved from another model: {name} has shape {size} there and "
                f"{tuple(value.shape)} in this model"
            )
    unknown = {key for key in saved if key.startswith("model.")} - names
    if unknown:
        first = min(unknown).removeprefix("model.")
        raise ValueError(f"{checkpoint} was saved from another model: this one has no {first}")


def _wanted_of_optimizer(
    flat: Mapping[str, Any], saved: Mapping[str, Any], trainable: set[str], own_keys: frozenset[str], checkpoint: str
) -> dict[str, Any]:
    """What to ask the checkpoint for, of what the live optimizer's state holds.

    A parameter that had no gradient before the save has no state there, and what only Mechanic has, others do without;
    any other state that is there must be wanted here. Settings that are tensors are read into copies, so that an
    optimizer can refuse them.
    """
    parameters = {
        key.removeprefix("param_groups.").rsplit(".", 1)[0] for key in flat if key.startswith("param_groups.")
    }
    states = [key.removeprefix("optimizer.state.") for key in saved if key.startswith("optimizer.state.")]
    have_state = {split(state, parameters)[0] for state in states}
    for path in states:
        parameter, state = split(path, parameters)
        if parameter in trainable and f"state.{path}" not in flat and state not in own_keys | _MECHANIC_KEYS:
            raise ValueError(
                f"{checkpoint} was saved from another optimizer, or one with other options: it has {state} for "
                f"{parameter}, this run's optimizer has none (if it took steps, load before the first)"
            )
    wanted = {}
    for key, value in flat.items():
        there = saved.get(f"optimizer.{key}")
        if key.startswith("param_groups."):
            if isinstance(value, torch.Tensor) and isinstance(there, TensorStorageMetadata):
                wanted[key] = torch.empty(there.size, dtype=there.properties.dtype, device=value.device)
            elif there is not None:
                wanted[key] = value.clone() if isinstance(value, torch.Tensor) else value
            continue
        parameter, state = split(key.removeprefix("state."), parameters)
        if parameter not in have_state or (there is None and state in own_keys):
            continue
        if there is None:
            raise ValueError(
                f"{checkpoint} was saved from another optimizer, or one with other options: it has no {state} for "
                f"{parameter}"
            )
        size = tuple(there.size) if isinstance(there, TensorStorageMetadata) else None
        expected = tuple(value.shape) if isinstance(value, torch.Tensor) else None
        if size != expected:
            raise ValueError(
                f"{checkpoint} was saved from another optimizer: {state} of {parameter} is "
                f"{'a number' if size is None else f'of shape {size}'} there and "
                f"{'a number' if expected is None else f'of shape {expected}'} in this run"
            )
        wanted[key] = value
    return wanted


def _wanted_of_object(name: str, live: Any, saved: Mapping[str, Any], checkpoint: str) -> Any:
    """What to ask the checkpoint for: the whole state, or tensor by tensor what the live one holds."""
    if f"objects.{name}" in saved:
        return (None,)
    there = {key for key in saved if key.startswith(f"objects.{name}.")}
    if not there:
        raise ValueError(f"{checkpoint} was saved without {name!r}; give Checkpointer the same objects as then")
    live = live[0] if isinstance(live, tuple) else live
    here = set(_keys(live, f"objects.{name}"))
    if here != there:
        raise ValueError(f"{checkpoint} has another state of {name!r}: they differ in {min(here ^ there)}")
    return live


def _keys(value: Any, prefix: str) -> Iterator[str]:
    """The keys under which DCP stores a nested state."""
    return (key for key, _ in _entries(value, prefix))


def _entries(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """A nested state as DCP stores it: keys, and what is stored under them."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _entries(each, f"{prefix}.{key}")
    elif isinstance(value, list) and any(isinstance(each, Mapping) or _has_tensor(each) for each in value):
        for index, each in enumerate(value):
            yield from _entries(each, f"{prefix}.{index}")
    else:
        yield prefix, value


def _number(value: Any) -> Any:
    """A NumPy scalar, which a schedule may have made a learning rate, as the number that it is."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 else value


def _whole_or_flat(state: Any) -> Any:
    """An object's state as it is where it holds tensors, which DCP then stores one by one; else as one value.

    One value comes back as it was, with its empty dicts, and with keys that a fresh object's state does not have.
    """
    return state if _has_tensor(state) else (state,)


def _has_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_tensor(each) for each in value.values())
    if isinstance(value, list):
        return any(_has_tensor(each) for each in value)
    return isinstance(value, torch.Tensor)


def split(path: str, parameters: Container[str]) -> tuple[str, str]:
    """A key of the flat state as a parameter's name and the rest, which is empty if no parameter is known."""
    name = path
    while name not in parameters:
        if "." not in name:
            return path, ""
        name = name.rsplit(".", 1)[0]
    return name, path[len(name) + 1 :]


def _ask_for_groups(zero: ZeroRedundancyOptimizer, names: Mapping[int, str], flat: dict[str, Any]) -> None:
    """Add the settings of every param group to what is to be loaded: a rank may own no parameter of a group."""
    for group, mine in zip(zero.param_groups, zero.optim.param_groups):
        first = names[id(group["params"][0])]
        for key, value in mine.items():
            if key != "params":
                value = value.clone() if isinstance(value, torch.Tensor) else value
                flat.setdefault(f"param_groups.{first}.{key}", value)


def _check_alike(first: Mapping[str, Any], other: Mapping[str, Any], checkpoint: str) -> None:
    """Raise ValueError unless two parameters that share a param group here had the same settings there."""
    for key in (first.keys() | other.keys()) - {"params"}:
        one, two = first.get(key), other.get(key)
        tensors = isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor)
        if not (torch.equal(cast(torch.Tensor, one), cast(torch.Tensor, two)) if tensors else one == two):
            raise ValueError(
                f"{checkpoint} was saved with other param groups: {first['params'][0]} has {key} {one} there and "
                f"{other['params'][0]} {two}; in this run they are in one group"
            )


def _nested(flat: Mapping[str, Any], group_of: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The optimizer state as torch nests it, with the param groups of ``group_of``, or one for each parameter.

    Torch's own inverse asks the live state for names, and with FSDP1 ranks then gather different ones.
    """
    parameters = set[str]()
    groups: dict[Any, dict[str, Any]] = {}
    for key, value in flat.items():
        kind, path = key.split(".", 1)
        if kind == "param_groups":
            name, setting = path.rsplit(".", 1)
            group = groups.setdefault(name if group_of is None else group_of.get(name, name), {"params": []})
            if name not in parameters:
                parameters.add(name)
                group["params"].append(name)
            group[setting] = value
    state: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        kind, path = key.split(".", 1)
        if kind == "state":
            name, rest = split(path, parameters)
            *outer, last = rest.split(".")
            place = state.setdefault(name, {})
            for part in outer:
                place = place.setdefault(part, {})
            place[last] = value
    # Torch takes an empty state for one with numbers as names, and does not look at the groups' names then.
    return {"state": state or {"": {}}, "param_groups": list(groups.values())}


def _load_zero(zero: ZeroRedundancyOptimizer, names: Mapping[int, str], flat: Mapping[str, Any]) -> None:
    """Load this rank's share of a ZeRO optimizer, of whose groups it may own nothing."""
    nested = _nested(flat)
    settings = {group["params"][0]: group for group in nested["param_groups"]}
    groups = []
    for group, mine in zip(zero.param_groups, zero.optim.param_groups):
        own = [names[id(parameter)] for parameter in mine["params"]]
        groups.append({**settings[names[id(group["params"][0])]], "params": own})
    owned = {name for group in groups for name in group["params"]}
    state = {name: value for name, value in nested["state"].items() if name in owned}
    zero.optim.load_state_dict({"state": state, "param_groups": groups})
    _copy_settings(zero.optim.param_groups, zero.param_groups)


def _copy_settings(source: Sequence[dict[str, Any]], target: Sequence[dict[str, Any]]) -> None:
    for theirs, mine in zip(source, target):
        mine.update({key: value for key, value in theirs.items() if key != "params"})


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if "numpy" in sys.modules:
        state["numpy"] = sys.modules["numpy"].random.get_state()
        if isinstance(state["numpy"], tuple):  # an array is none of the plain data that is loaded again
            state["numpy"] = tuple(each.tolist() if hasattr(each, "tolist") else each for each in state["numpy"])
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    if "torch" in state:
        torch.set_rng_state(state["torch"])
    if "python" in state:
        random.setstate(state["python"])
    if "numpy" in state and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(state["numpy"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
