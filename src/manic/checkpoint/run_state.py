"""The whole state of a run as one state dict: model, optimizers, other objects and random states.

Collects and applies them for any layout and optimizer, without access to files. flat_state.py names the entries in a
checkpoint; matching.py decides whether a checkpoint fits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

from manic.checkpoint.by_name import add_settings_of_all_groups, copy_settings, load_by_name, own_keys_of
from manic.checkpoint.flat_state import (
    all_parameter_names,
    as_number,
    flat_entries,
    flat_keys,
    flatten,
    nest,
    parameter_names,
    split,
    whole_or_flat,
)
from manic.checkpoint.matching import Member, check_model, check_same_settings, wanted_of_object, wanted_of_optimizer
from manic.checkpoint.names import check_in_model, check_one_value_of_each_name
from manic.checkpoint.random_state import random_state, set_random_state
from manic.checkpoint.safe_pickle import check_loadable
from manic.checkpoint.settings import LiveTensors, converted, same
from manic.checkpoint.shards import complete_shards
from manic.distributed.collectives import from_every_rank, on_every_rank, rank
from manic.optimizer.own_state_dict import extra_entries

__all__ = ["RunState"]

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
        model, optimizer = get_state_dict(self.model, self._inner())
        return {
            "model": model,
            "optimizer": {key: as_number(value) for key, value in flatten(optimizer).items()},
            "optimizer_extra": self._extra(),
            "objects": {name: whole_or_flat(thing.state_dict()) for name, thing in self.objects.items()},
            "random": {str(rank()): random_state()},
        }

    def collect_to_save(self, group: ProcessGroup | None) -> dict[str, Any]:
        """The current state as it is saved: with the shards of a parameter's state that only other ranks have.

        Raises:
            ValueError: on every rank, if an entry of any rank would be refused by a load, or a name has other values
                on other ranks.
        """
        on_every_rank(lambda: check_in_model(self.model, self.optimizers), group)

        def collect() -> dict[str, Any]:
            state = self.collect()
            check_loadable(self.plain_entries(state))
            return state

        state = on_every_rank(collect, group)
        check_one_value_of_each_name(self.model, self.optimizers, state["optimizer"], group)
        if not self.is_fsdp1:  # whose state dicts are gathered by torch
            parameters = {name: member.tensor for name, member in self._members(set()).items()}
            complete_shards(state["optimizer"], parameters, group)
        extras = from_every_rank(state["optimizer_extra"], group)
        if any((extra and self.is_fsdp1) or not same(extra, extras[0]) for extra in extras):
            raise ValueError(
                f"not saved: an optimizer's state_dict() has entries besides its state and param groups, {extras[0]}, "
                "which differ between ranks, or which torch does not load with FSDP1. Save them by objects="
            )
        return state

    def _extra(self) -> dict[str, Any]:
        """By the optimizers' numbers: what their state dicts hold that torch's checkpoints leave out, as one value."""
        extras = {str(number): extra_entries(inner.state_dict()) for number, inner in enumerate(self._inner())}
        return {number: (extra,) for number, extra in extras.items() if extra}

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
        on_every_rank(lambda: check_in_model(self.model, self.optimizers), group)
        # Gradients are useless after a load, and torch creates no state to load into while they exist.
        self.model.zero_grad(set_to_none=True)
        with self._trainable(saved):
            state = on_every_rank(self.collect, group)
            self._load(state, saved, read, name, group)

    def _load(
        self, state: dict[str, Any], saved: Mapping[str, Any], read: Read, name: str, group: ProcessGroup | None
    ) -> None:
        for optimizer in self.optimizers:
            if isinstance(optimizer, ZeroRedundancyOptimizer):
                add_settings_of_all_groups(optimizer, parameter_names(self.model), state["optimizer"], saved)
        own_keys = frozenset[str]().union(*(own_keys_of(inner) for inner in self._inner()))
        # The ranks of a pipeline hold different parts of the model, those of ZeRO different parts of the optimizer.
        mine = set(flat_keys(state["model"], "model")), {*self._members(set())}, self._with_state()
        everyones = [set().union(*each) for each in zip(*from_every_rank(mine, group))]
        names, parameters, with_state = everyones
        members = self._members(with_state)

        def select() -> tuple[dict[str, Any], dict[str, Any]]:
            check_model(state["model"], saved, names, name)
            objects = {each: wanted_of_object(each, value, saved, name) for each, value in state["objects"].items()}
            return wanted_of_optimizer(state["optimizer"], saved, members, parameters, name), objects

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
        extra = {key.removeprefix("optimizer_extra."): None for key in saved if key.startswith("optimizer_extra.")}
        mine_random = state["random"][str(rank())]
        mine_random = {key: value for key, value in mine_random.items() if f"random.{rank()}.{key}" in saved}

        small = {"optimizer": settings, "optimizer_extra": extra, "random": {str(rank()): mine_random}}
        # Plain entries stored among tensors are read before the tensors, which are read in place: they may be refused.
        among = {name: each for name, each in objects.items() if not isinstance(each, tuple)}
        read({**small, **dict(self.plain_entries({"model": state["model"], "objects": among}))})

        def check() -> dict[str, Any]:
            live = state["optimizer"]
            as_here = {
                key: converted(value, live[key], f"{name}: {key.removeprefix('param_groups.')}")
                if key.startswith("param_groups.") and key in live and key.rsplit(".", 1)[1] not in own_keys
                else value
                for key, value in small["optimizer"].items()
            }
            self._check_settings(as_here, name)
            for number, (entries,) in small["optimizer_extra"].items():
                if unknown := entries.keys() - state["optimizer_extra"].get(number, ({},))[0].keys():
                    raise ValueError(
                        f"{name} is of another optimizer: state_dict() of optimizer {number} had {min(unknown)!r} there"
                    )
            return as_here

        small["optimizer"] = on_every_rank(check, group)
        read(object_states)  # after every other check: tensors are read in place
        on_every_rank(lambda: self._load_objects(object_states["objects"]), group)

        tensors = {key: value for key, value in wanted.items() if key not in settings}
        large = {"model": state["model"], "optimizer": tensors}
        read(large)

        def apply() -> None:
            set_model_state_dict(self.model, large["model"])
            self._load_optimizers(kept, {**small["optimizer"], **large["optimizer"]}, small["optimizer_extra"])
            set_random_state(small["random"].get(str(rank()), {}))

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
                copy_settings(each.param_groups, each.optim.param_groups)
                each = each.optim
            inner.append(each)
        return inner

    def _members(self, with_state: Container[str]) -> dict[str, Member]:
        """The optimizers' parameters on this rank, by name; ``with_state``: names whose optimizer keeps any state."""
        names = all_parameter_names(self.model)
        return {
            name: Member(parameter, own_keys_of(inner), name in with_state)
            for inner in self._inner()
            for group in inner.param_groups
            for parameter in group["params"]
            for name in names[id(parameter)]
        }

    def _with_state(self) -> set[str]:
        """Names of the parameters of which the optimizer keeps a state of any on this rank, besides ``own_keys``."""
        names = all_parameter_names(self.model)
        return {
            name
            for optimizer, inner in zip(self.optimizers, self._inner())  # ZeRO's inner one has a part of the parameters
            if any(isinstance(each, dict) and each.keys() - own_keys_of(inner) for each in inner.state.values())
            for group in optimizer.param_groups
            for parameter in group["params"]
            for name in names[id(parameter)]
        }

    @contextmanager
    def _trainable(self, saved: Iterable[str]) -> Iterator[None]:
        """Let torch create and load state of frozen parameters of which the checkpoint has state, and of no others."""
        members, prefix = self._members(set()), "optimizer.state."
        have_state = {split(key.removeprefix(prefix), members)[0] for key in saved if key.startswith(prefix)}
        tensors = (members[name].tensor for name in have_state if name in members)
        frozen = [each for each in tensors if not each.requires_grad and each.is_floating_point()]
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)

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

    def _load_optimizers(self, kept: Mapping[str, Any], flat: Mapping[str, Any], extras: Mapping[str, Any]) -> None:
        names = parameter_names(self.model)
        for number, (optimizer, inner) in enumerate(zip(self.optimizers, self._inner())):
            (extra,) = extras.get(str(number), ({},))
            tensors = LiveTensors(inner, own_keys_of(inner))
            if self.is_fsdp1:
                # Not strict: SGD without momentum has no state; missing state was detected before.
                options = StateDictOptions(strict=False)
                nested = nest({**kept, **flat}, self._groups(inner))
                set_optimizer_state_dict(self.model, inner, nested, options=options)
            else:
                load_by_name(optimizer, inner, names, flat, extra)
            tensors.keep(inner.param_groups)
            if inner is not optimizer:
                copy_settings(inner.param_groups, optimizer.param_groups)


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
