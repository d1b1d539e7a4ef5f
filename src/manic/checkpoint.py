"""Checkpointer: sharded checkpoints of a training run through ``torch.distributed.checkpoint``.

It works with any optimizer, and any layout that DCP knows; what it writes can be loaded on another number of ranks. It
knows what a directory of checkpoints looks like, and nothing of Mechanic.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

__all__ = ["Checkpointer", "on_first_rank"]

T = TypeVar("T")

_STEP = re.compile(r"step_(\d+)")
# Flat, so that every value stands under its parameter's name, and ranks may own different parameters.
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Checkpointer:
    """Saves and loads the whole state of a run: model, optimizer, the random state, and what else is given.

    Every step gets a directory of its own, ``step_00000100``, which appears when it is complete and is never written
    over. All methods but :meth:`steps` and :meth:`latest` must be called on all ranks.

    Args:
        directory: Where checkpoints live; made when the first one is saved. On several nodes: a shared one.
        model: The model, sharded or wrapped in whatever way.
        optimizer: Its optimizer, or several.
        objects: Whatever else has ``state_dict`` and ``load_state_dict``, the same on all ranks: a scheduler, say.
        keep_latest: How many checkpoints to keep, the newest ones; ``None``: all.
        keep_every: Keep those whose step is a multiple of this as well.

    Raises:
        ValueError: if ``keep_latest`` or ``keep_every`` is not positive.
    """

    def __init__(
        self,
        directory: str | Path,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        objects: Mapping[str, Stateful] | None = None,
        keep_latest: int | None = None,
        keep_every: int | None = None,
    ) -> None:
        for name, value in (("keep_latest", keep_latest), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive or None, got {value}")
        self.directory = Path(directory)
        self.model = model
        self.optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self.objects = dict(objects or {})
        self.keep_latest = keep_latest
        self.keep_every = keep_every

    def steps(self) -> list[int]:
        """The steps that there are complete checkpoints of, ascending."""
        if not self.directory.is_dir():
            return []
        found = (_STEP.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def latest(self) -> int | None:
        """The newest step that there is a complete checkpoint of."""
        return max(self.steps(), default=None)

    def path(self, step: int) -> Path:
        """Where the checkpoint of ``step`` is, or would be."""
        return self.directory / f"step_{step:08d}"

    def save(self, step: int) -> Path:
        """Save the state of the run after ``step`` steps.

        Args:
            step: How many steps were taken; not negative.

        Returns:
            The checkpoint's directory.

        Raises:
            FileExistsError: on every rank, if there is a checkpoint of that step.
            OSError: on every rank, if it cannot be written.
            ValueError: if ``step`` is negative.
        """
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        path = self.path(step)
        partial = path.with_name(f".incomplete_{path.name}")

        def prepare() -> None:
            if path.exists():
                raise FileExistsError(f"{path} exists; checkpoints are never written over")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        def publish() -> None:
            partial.rename(path)
            self._retire(step)

        on_first_rank(prepare)
        try:
            dcp.save(self._state(), checkpoint_id=partial)
        except CheckpointException as error:
            raise OSError(f"could not write {partial}: {_reasons(error)}") from error
        on_first_rank(publish)
        return path

    def load(self, step: int | str | Path = "latest") -> None:
        """Load a checkpoint into model, optimizer and objects, whatever number of ranks it was saved on.

        Where it holds no random state of this rank, the present one is kept.

        Args:
            step: Which one: a step, ``"latest"``, or the path of a checkpoint anywhere.

        Raises:
            FileNotFoundError: on every rank, if there is no such checkpoint.
            ValueError: on every rank, if it is of another model, whereupon nothing has changed; or if an object or the
                optimizer refuses it, whereupon the model may have: do not go on with it.
        """

        def find() -> Path:
            if isinstance(step, (str, Path)) and step != "latest":
                path = Path(step)
            else:
                chosen = self.latest() if step == "latest" else int(step)
                if chosen is None:
                    raise FileNotFoundError(f"there is no checkpoint in {self.directory}")
                path = self.path(chosen)
            if not (path / ".metadata").is_file():
                there = f"there are steps {self.steps()}"
                raise FileNotFoundError(f"{path} is no checkpoint: it has no .metadata file; {there}")
            return path

        # One rank looks: on a shared file system, others may not see the newest directory yet.
        path = on_first_rank(find)
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        # Of no use after a load; and while there are any, torch creates no state to load into.
        self.model.zero_grad(set_to_none=True)
        state = self._state()
        for optimizer in self.optimizers:
            if isinstance(optimizer, ZeroRedundancyOptimizer):
                _ask_for_groups(optimizer, self._names(), state["optimizer"])
        _raise_everywhere(_mismatch(state["model"], saved, path))
        state["optimizer"] = _wanted(state["optimizer"], saved)
        if any(f"random.{_rank()}.{name}" not in saved for name in state["random"][str(_rank())]):
            del state["random"]  # saved on fewer ranks, or on other devices
        # First what is cheap and may refuse, then what is large.
        objects = {"objects": state.pop("objects")}
        _read(objects, path)
        for name, thing in self.objects.items():
            thing.load_state_dict(objects["objects"][name])
        _read(state, path)
        set_model_state_dict(self.model, state["model"])
        for optimizer in self.optimizers:
            if isinstance(optimizer, ZeroRedundancyOptimizer):
                _load_zero(optimizer, self._names(), state["optimizer"])
            else:
                # Not strict: whatever has a state here was asked for and found, and SGD without momentum has none.
                options = StateDictOptions(strict=False)
                set_optimizer_state_dict(self.model, optimizer, _nested(state["optimizer"]), options=options)
        if "random" in state:
            _set_random_state(state["random"][str(_rank())])

    def _state(self) -> dict[str, Any]:
        inner = []
        for each in self.optimizers:
            if isinstance(each, ZeroRedundancyOptimizer):
                # ZeRO's own state dict is gathered on one rank; the optimizer inside holds this rank's share of it, but
                # hears of a scheduler's changes only at the next step.
                _copy_settings(each.param_groups, each.optim.param_groups)
                each = each.optim
            inner.append(each)
        model, optimizer = get_state_dict(self.model, inner, options=_FLAT)
        return {
            "model": model,
            "optimizer": optimizer,
            "objects": {name: thing.state_dict() for name, thing in self.objects.items()},
            "random": {str(_rank()): _random_state()},
        }

    def _names(self) -> dict[int, str]:
        """The name in a checkpoint of each parameter, by identity: what DDP and compilation prefix is left out."""
        return {
            id(parameter): re.sub(r"(^|\.)(module\.|_orig_mod\.)", r"\1", name)
            for name, parameter in self.model.named_parameters()
        }

    def _retire(self, saved: int) -> None:
        """Remove what is not to be kept; what has just been saved is."""
        if self.keep_latest is None:
            return
        for step in self.steps()[: -self.keep_latest]:
            if step != saved and (self.keep_every is None or step % self.keep_every):
                # Out of sight first: a directory that is half removed must not look like a checkpoint.
                doomed = self.path(step).rename(self.directory / f".removed_{self.path(step).name}")
                shutil.rmtree(doomed, ignore_errors=True)


def _ask_for_groups(zero: ZeroRedundancyOptimizer, names: Mapping[int, str], flat: dict[str, Any]) -> None:
    """Add the settings of every param group to what is to be loaded: a rank may own no parameter of a group."""
    for group, mine in zip(zero.param_groups, zero.optim.param_groups):
        first = names[id(group["params"][0])]
        for key, value in mine.items():
            if key != "params":
                value = value.clone() if isinstance(value, torch.Tensor) else value
                flat.setdefault(f"param_groups.{first}.{key}", value)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer state as torch nests it, with a param group for each parameter.

    Torch's own inverse asks the live state for names, and with FSDP1 ranks then gather different ones.
    """
    groups: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        kind, path = key.split(".", 1)
        if kind == "param_groups":
            name, setting = path.rsplit(".", 1)
            groups.setdefault(name, {"params": [name]})[setting] = value
    state: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        kind, path = key.split(".", 1)
        if kind == "state":
            name, rest = path, list[str]()
            while name not in groups:
                name, part = name.rsplit(".", 1)
                rest.insert(0, part)
            place = state.setdefault(name, {})
            for part in rest[:-1]:
                place = place.setdefault(part, {})
            place[rest[-1]] = value
    return {"state": state, "param_groups": list(groups.values())}


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


def _read(state: dict[str, Any], path: Path) -> None:
    """Fill ``state`` from the checkpoint; ValueError on every rank if it lacks what is asked for."""
    try:
        dcp.load(state, checkpoint_id=path)
    except CheckpointException as error:
        raise ValueError(f"{path} does not fit this run: {_reasons(error)}") from error


def _wanted(flat: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """What to ask the checkpoint for, of what the live optimizer's state holds.

    A parameter that had no gradient before the save has no state there. Settings that are tensors are read into copies,
    so that an optimizer can refuse them.
    """
    has_state = {tuple(key.split(".")[2:-1]) for key in saved if key.startswith("optimizer.state.")}
    wanted = {}
    for key, value in flat.items():
        parts = tuple(key.split(".")[1:-1])
        if key.startswith("state.") and not any(parts[: len(parts) - i] in has_state for i in range(len(parts))):
            continue
        is_setting = key.startswith("param_groups.") and isinstance(value, torch.Tensor)
        wanted[key] = value.clone() if is_setting else value
    return wanted


def _reasons(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {reason[0]}" for rank, reason in error.failures.items())


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def on_first_rank(action: Callable[[], T]) -> T:
    """Do it on rank 0; its result, or its error, is every rank's."""
    box: list[Any] = [None, None]
    if _rank() == 0:
        try:
            box[0] = action()
        except Exception as error:  # whatever it is, the other ranks are waiting
            box[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    result: T = box[0]
    return result


def _raise_everywhere(message: str | None) -> None:
    messages: list[str | None] = [message]
    if dist.is_initialized():
        messages = [None] * dist.get_world_size()
        dist.all_gather_object(messages, message)
    for text in messages:
        if text is not None:
            raise ValueError(text)


def _mismatch(model: Mapping[str, Any], saved: Mapping[str, Any], path: Path) -> str | None:
    """In what the model differs from the one in the checkpoint, in words; ``None``: in nothing."""
    names: list[set[str]] = [set(model)]
    if dist.is_initialized():  # a pipeline's ranks hold different parts
        names = [set()] * dist.get_world_size()
        dist.all_gather_object(names, set(model))
    for name, value in model.items():
        there = saved.get(f"model.{name}")
        if there is None:
            return f"{path} was saved from another model: it has no {name}"
        if isinstance(value, torch.Tensor) and tuple(there.size) != tuple(value.shape):
            return (
                f"{path} was saved from another model: {name} has shape {tuple(there.size)} there and "
                f"{tuple(value.shape)} in this model"
            )
    unknown = {key.removeprefix("model.") for key in saved if key.startswith("model.")} - set().union(*names)
    return f"{path} was saved from another model: this one has no {min(unknown)}" if unknown else None


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
