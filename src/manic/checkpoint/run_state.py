"""The whole state of a run as one state dict: model, optimizers, other objects and random states.

Collects and applies them for any layout and optimizer, without access to files. flat_state.py names the entries in a
checkpoint; matching.py decides whether a checkpoint fits.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
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

from manic.checkpoint.flat_state import (
    all_parameter_names,
    as_number,
    flat_entries,
    flat_keys,
    nest,
    parameter_names,
    whole_or_flat,
)
from manic.checkpoint.matching import check_model, check_same_settings, wanted_of_object, wanted_of_optimizer
from manic.distributed.collectives import from_every_rank, on_every_rank, rank

__all__ = ["RunState"]

# Flat: every value has its parameter's name in its key, and ranks may own different parameters.
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)

Read = Callable[[dict[str, Any]], None]
"""Fills a state dict; tensors in place."""


class RunState:
    """The parts of a run that are saved.

    Args:
        model: The model, sharded or wrapped by any of PyTorch's wrappers.
        optimizers: Its optimizers. State and settings named in an optimizer's property ``own_keys`` may be missing
            from a checkpoint. A method ``check_param_groups`` may refuse the saved settings before loading.
        objects: Further objects with ``state_dict`` and ``load_state_dict``, the same on all ranks.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], objects: Mapping[str, Stateful]) -> None:
        self.model = model
        self.optimizers = list(optimizers)
        self.objects = dict(objects)

    def collect(self) -> dict[str, Any]:
        """The current state. Tensors are the run's tensors, not copies."""
        model, optimizer = get_state_dict(self.model, self._inner(), options=_FLAT)
        return {
            "model": model,
            "optimizer": {key: as_number(value) for key, value in optimizer.items()},
            "objects": {name: whole_or_flat(thing.state_dict()) for name, thing in self.objects.items()},
            "random": {str(rank()): _random_state()},
        }

    @staticmethod
    def plain_entries(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Entries of :meth:`collect` that are not tensors, by the keys under which DCP stores them."""
        for kind, each in state.items():
            for key, value in flat_entries(each, kind):
                if not isinstance(value, torch.Tensor):
                    yield key, value

    def load(self, saved: Mapping[str, Any], read: Read, name: str, group: ProcessGroup | None) -> None:
        """Load a checkpoint; every check runs before the first change.

        Args:
            saved: DCP's metadata of every key in the checkpoint.
            read: Reads from the checkpoint.
            name: The checkpoint's name in messages.
            group: A group of all ranks; ``None``: the default group.

        Raises:
            ValueError: on every rank, if the checkpoint does not fit this run; nothing has changed then, unless one of
                the objects refused its state.
        """
        # Gradients are useless after a load, and torch creates no state to load into while they exist.
        self.model.zero_grad(set_to_none=True)
        state = on_every_rank(self.collect, group)
        for optimizer in self.optimizers:
            if isinstance(optimizer, ZeroRedundancyOptimizer):
                _add_settings_of_all_groups(optimizer, parameter_names(self.model), state["optimizer"])
        own_keys = frozenset[str]().union(*(getattr(inner, "own_keys", ()) for inner in self._inner()))
        # The ranks of a pipeline hold different parts of the model.
        names: set[str] = set().union(*from_every_rank(set(flat_keys(state["model"], "model")), group))
        trainable = set().union(*(self._trainable(inner) for inner in self._inner()))

        def select() -> tuple[dict[str, Any], dict[str, Any]]:
            check_model(state["model"], saved, names, name)
            objects = {each: wanted_of_object(each, value, saved, name) for each, value in state["objects"].items()}
            return wanted_of_optimizer(state["optimizer"], saved, trainable, own_keys, name), objects

        wanted, objects = on_every_rank(select, group)
        settings = {
            key: value
            for key, value in wanted.items()
            if key.startswith("param_groups.") or not isinstance(value, torch.Tensor)
        }
        # A setting missing from the checkpoint, for example of an older torch, keeps its value; own_keys are reset.
        kept = {
            key: value
            for key, value in state["optimizer"].items()
            if key.startswith("param_groups.") and key not in settings and key.rsplit(".", 1)[1] not in own_keys
        }
        object_states = {"objects": objects}
        mine = state["random"][str(rank())]
        mine = {key: value for key, value in mine.items() if f"random.{rank()}.{key}" in saved}

        small = {"optimizer": settings, "random": {str(rank()): mine}}
        # Plain entries stored among tensors are read before the tensors, which are read in place: they may be refused.
        among = {name: each for name, each in objects.items() if not isinstance(each, tuple)}
        read({**small, **dict(self.plain_entries({"model": state["model"], "objects": among}))})
        on_every_rank(lambda: self._check_settings(small["optimizer"], name), group)
        read(object_states)  # after every other check: tensors are read in place
        on_every_rank(lambda: self._load_objects(object_states["objects"]), group)

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
        """Whether the model's state holds ShardedTensors."""
        return any(isinstance(module, FullyShardedDataParallel) for module in self.model.modules())

    def layout(self) -> dict[str, int]:
        """Number of parameters by placement, in words."""
        wrappers = [
            cls.__name__
            for cls in (DistributedDataParallel, FullyShardedDataParallel)
            if any(isinstance(module, cls) for module in self.model.modules())
        ]
        plain = " ".join(["plain", *wrappers])
        return dict(Counter(_placement(p) or plain for p in self.model.parameters()))

    def _inner(self) -> list[Optimizer]:
        """The optimizers; for ZeRO, the inner one: ZeRO's own state dict is gathered on one rank."""
        inner = []
        for each in self.optimizers:
            if isinstance(each, ZeroRedundancyOptimizer):
                # A scheduler's changes reach the inner optimizer only at the next step.
                _copy_settings(each.param_groups, each.optim.param_groups)
                each = each.optim
            inner.append(each)
        return inner

    def _trainable(self, inner: Optimizer) -> set[str]:
        """Names of an optimizer's trainable parameters."""
        names = parameter_names(self.model)
        return {names[id(p)] for group in inner.param_groups for p in group["params"] if p.requires_grad}

    def _groups(self, inner: Optimizer) -> dict[str, int]:
        """Index of the param group by parameter name; FSDP1's flat parameters have several names."""
        names = all_parameter_names(self.model)
        groups = enumerate(inner.param_groups)
        return {name: index for index, group in groups for p in group["params"] for name in names[id(p)]}

    def _check_settings(self, settings: Mapping[str, Any], checkpoint: str) -> None:
        each = {group["params"][0]: group for group in nest(settings)["param_groups"]}
        for inner in self._inner():
            groups: dict[int, list[dict[str, Any]]] = {}
            for name, index in self._groups(inner).items():
                if name in each:
                    groups.setdefault(index, []).append(each[name])
            for first, *others in groups.values():
                for other in others:
                    check_same_settings(first, other, checkpoint)
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
                # Not strict: SGD without momentum has no state; missing state was detected before.
                options = StateDictOptions(strict=False)
                set_optimizer_state_dict(self.model, optimizer, nest(flat, self._groups(optimizer)), options=options)


def _placement(parameter: torch.Tensor) -> str | None:
    """A DTensor's placements in words; ``None`` for other tensors."""
    if not isinstance(parameter, DTensor):
        return None
    mesh = parameter.device_mesh
    names = mesh.mesh_dim_names or ("",) * mesh.ndim
    return ", ".join(
        f"{placement!r} on {size} ranks{f' ({name})' if name else ''}"
        for placement, size, name in zip(parameter.placements, mesh.shape, names)
    )


def _add_settings_of_all_groups(zero: ZeroRedundancyOptimizer, names: Mapping[int, str], flat: dict[str, Any]) -> None:
    """Add the settings of every param group to the entries to load: a rank may own no parameter of a group."""
    for group, mine in zip(zero.param_groups, zero.optim.param_groups):
        first = names[id(group["params"][0])]
        for key, value in mine.items():
            if key != "params":
                value = value.clone() if isinstance(value, torch.Tensor) else value
                flat.setdefault(f"param_groups.{first}.{key}", value)


def _load_zero(zero: ZeroRedundancyOptimizer, names: Mapping[int, str], flat: Mapping[str, Any]) -> None:
    """Load this rank's part of a ZeRO optimizer; the rank may own no parameter of a group."""
    nested = nest(flat)
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
        if isinstance(state["numpy"], tuple):  # an array is not plain data and would be refused
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
