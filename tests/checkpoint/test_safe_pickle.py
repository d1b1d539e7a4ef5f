"""Unpickling yields only tensors, plain data and DCP's index; other globals are neither called nor changed."""

from __future__ import annotations

import collections
import io
import pickle
import random
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as OlderProperties
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.optim import lr_scheduler

from manic.checkpoint import Checkpointer
from manic.checkpoint.files import Files
from manic.checkpoint.safe_pickle import check_loadable, read_metadata
from support.forgery import put, saved, seal

PREFIX = b"\x80\x04ctorch.distributed.checkpoint.metadata\n"
MEM_FORMATS = torch_metadata._MEM_FORMAT_ENCODING


def index(path: str = "__0_0.distcp", **entries: Any) -> Metadata:
    return Metadata(entries, storage_data={MetadataIndex("x", [0], 0): _StorageInfo(path, 0, 1)})


def tensor(properties: Any) -> TensorStorageMetadata:
    return TensorStorageMetadata(properties, torch.Size([2]), [])


@pytest.mark.parametrize("dtype", [each for each in vars(torch).values() if isinstance(each, torch.dtype)], ids=str)
def test_an_index_may_hold_any_dtype(dtype: torch.dtype) -> None:
    whole = index(x=tensor(TensorProperties(dtype=dtype)))
    found = read_metadata(pickle.dumps(whole))
    assert found == whole
    assert type(found.state_dict_metadata["x"].properties) is TensorProperties


class ByName(pickle.Pickler):
    """Pickles an enum's members as Python 3.11.2 does."""

    def reducer_override(self, thing: Any) -> Any:
        return (getattr, (MEM_FORMATS, thing.name)) if isinstance(thing, MEM_FORMATS) else NotImplemented


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last, torch.preserve_format], ids=str)
def test_reads_an_index_of_another_python_or_torch(form: torch.memory_format) -> None:
    whole = index(x=tensor(TensorProperties(memory_format=form)))
    stream = io.BytesIO()
    ByName(stream).dump(whole)
    assert b"getattr" in stream.getvalue()
    assert read_metadata(stream.getvalue()) == whole

    older = read_metadata(pickle.dumps(index(x=tensor(OlderProperties(memory_format=form)))))
    assert older == whole

    whole.storage_meta = StorageMeta(PurePosixPath("/a/b"))
    content = pickle.dumps(whole, 2)
    for module in (b"cpathlib\n", b"cpathlib._local\n"):  # Python 3.13 has the latter
        found = read_metadata(re.sub(rb"cpathlib[._a-z]*\n", module, content))
        assert found == whole


@pytest.mark.parametrize("content", [
    b"Metadata\nN}\x8c\x06poisonK\x01s\x86b.",  # sets an attribute of the class
    b"TensorProperties\nN}\x8c\x06poisonK\x01s\x86b.",
    b"_MEM_FORMAT_ENCODING\nK\x00\x85R}\x8c\x06poisonK\x01sb.",  # of an enum's member
    b"_MEM_FORMAT_ENCODING\n}\x8c\x06poisonK\x01sb.",
    b"Metadata\ncbuiltins\ngetattr\n\x8c\x08__init__\x86R.",
    b"Metadata.__init__.__globals__\n.",
    b"pickle\n.",
], ids=range(7))  # fmt: skip
def test_pickles_cannot_change_or_inspect_classes(content: bytes) -> None:
    with pytest.raises((pickle.UnpicklingError, AttributeError, KeyError, TypeError)):
        read_metadata(PREFIX + content)
    for thing in (Metadata, TensorProperties, MEM_FORMATS, *MEM_FORMATS):
        assert not hasattr(thing, "poison")


class Reaching:
    """Names a function through an allowed class."""

    def __reduce__(self) -> Any:
        return getattr, (Metadata, "__init__")


def test_getattr_resolves_only_memory_formats() -> None:
    with pytest.raises(KeyError, match="__init__"):
        read_metadata(pickle.dumps(Metadata({}, planner_data=Reaching())))


@pytest.mark.parametrize("path", ["/etc/passwd", "../step_00000001/__0_0.distcp", "a/../../b"])
def test_refuses_an_index_with_files_outside_the_checkpoint(path: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match=f"a file outside the checkpoint: {path}"):
        read_metadata(pickle.dumps(index(path)))


@pytest.mark.parametrize("thing", [{}, 7, _StorageInfo("x", 0, 1)], ids=str)
def test_refuses_other_objects_as_index(thing: Any) -> None:
    with pytest.raises(pickle.UnpicklingError, match=f"a {type(thing).__name__}, not an index"):
        read_metadata(pickle.dumps(thing))


class Position(int):
    """A number, as torch accepts in an optimizer's state, of a class that is not allowed."""


class Loader:
    """An object with any state."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return {"position": self.state}

    def load_state_dict(self, state: Any) -> None:
        self.state = state["position"]


class Net(nn.Linear):
    """Has extra state besides its tensors."""

    def __init__(self, extra: Any = 0) -> None:
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


class Marking(torch.optim.SGD):
    """Has state that is not a tensor."""

    mark: Any = 0

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["mark"] = self.mark


def marking(model: nn.Module, mark: Any) -> Marking:
    optimizer = Marking(model.parameters(), lr=1.0)
    optimizer.mark = mark
    return optimizer


def checkpointer(directory: Path, model: nn.Module | None = None, mark: Any = 0, **objects: Any) -> Checkpointer:
    model = model or nn.Linear(2, 2)
    return Checkpointer(directory, model, marking(model, mark), objects=objects)


@pytest.mark.parametrize(("state", "name"), [
    (Position(), "test_safe_pickle.Position"), (frozenset({1}), "builtins.frozenset"),
    (collections.deque([1]), "collections.deque"), (np.float64(1), "numpy._core.multiarray.scalar"),
    (print, "builtins.print"), ([{"a": (1, Position())}], "test_safe_pickle.Position"),
], ids=lambda value: str(value)[:20])  # fmt: skip
def test_does_not_save_what_a_load_would_refuse(state: Any, name: str, tmp_path: Path) -> None:
    expected = rf"objects\.loader\S* holds .*{name}.*torch\.serialization\.add_safe_globals"
    on_errors: list[Literal["raise", "warn"]] = ["raise", "warn"]
    for on_error in on_errors:
        one = checkpointer(tmp_path, loader=Loader(state))
        one.on_error = on_error
        for save in (one.save, one.async_save):
            with pytest.raises(ValueError, match=f"not saved, because a load would refuse it: {expected}"):
                save(1)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def allowed() -> Iterator[None]:
    """Allow the class as the message advises."""
    torch.serialization.add_safe_globals([Position])
    yield
    _forget()


def _forget() -> None:
    kept = [each for each in torch.serialization.get_safe_globals() if each is not Position]
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(kept)


@pytest.mark.parametrize("where", ["object", "beside tensors", "model", "optimizer"])
def test_loads_only_allowed_classes(where: str, allowed: None, tmp_path: Path) -> None:
    def make(state: Any, average: float) -> tuple[Checkpointer, Net, Loader, Marking]:
        model = Net(state if where == "model" else 0)
        both = {"average": torch.full((2,), average), "at": state}
        loader = Loader({"object": state, "beside tensors": both}.get(where, 0))
        optimizer = marking(model, state if where == "optimizer" else 0)
        return Checkpointer(tmp_path, model, optimizer, objects={"loader": loader}), model, loader, optimizer

    make(Position(3), 1.0)[0].save(1)
    other, model, loader, optimizer = make(Position(0), 0.0)
    weight = model.weight.detach().clone()
    _forget()
    name = {"model": r"model\._extra_state", "optimizer": r"optimizer\.state\.\w+\.mark"}.get(where, r"objects\.loader")
    with pytest.raises(ValueError, match=rf"step_00000001 is not loaded: .*{name}.* holds test_safe_pickle\.Position"):
        other.load()
    assert torch.equal(model.weight, weight)
    assert Position(3) not in (model.extra, loader.state)
    if where == "beside tensors":
        assert torch.equal(loader.state["average"], torch.zeros(2))

    torch.serialization.add_safe_globals([Position])
    other.load()
    assert not torch.equal(model.weight, weight)
    marks = [state["mark"] for state in optimizer.state.values()]
    loaded = {"model": model.extra, "optimizer": marks[0]}.get(where, loader.state)
    assert (loaded["at"] if where == "beside tensors" else loaded) == Position(3)


def test_checks_plain_data_without_saving_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [(str(each), each) for each in (1, 1.5, "a", None, True, (1, [2, {"x": 2.5}]), random.getstate())]
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", None)
        check_loadable(plain)
    check_loadable([("bytes", b"x"), ("set", {1}), ("complex", 1j), ("tensor", (torch.ones(2), torch.float16))])


def schedulers() -> dict[str, Any]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0, momentum=0.9)
    constant = lr_scheduler.ConstantLR
    options: dict[str, dict[str, Any]] = {
        "LambdaLR": {"lr_lambda": lambda step: 1.0},
        "MultiplicativeLR": {"lr_lambda": lambda step: 1.0},
        "StepLR": {"step_size": 2},
        "MultiStepLR": {"milestones": [1, 3]},
        "ExponentialLR": {"gamma": 0.9},
        "SequentialLR": {"schedulers": [constant(optimizer), constant(optimizer)], "milestones": [1]},
        "CosineAnnealingLR": {"T_max": 4},
        "CyclicLR": {"base_lr": 0.1, "max_lr": 1.0},
        "CosineAnnealingWarmRestarts": {"T_0": 2},
        "OneCycleLR": {"max_lr": 1.0, "total_steps": 9},
    }
    made = {"ChainedScheduler": lr_scheduler.ChainedScheduler([constant(optimizer), constant(optimizer)])}
    for name in sorted(set(lr_scheduler.__all__) - {"ChainedScheduler", "LRScheduler"}):
        made[name] = getattr(lr_scheduler, name)(optimizer, **options.get(name, {}))
    return made


@pytest.mark.parametrize("name", sorted(set(lr_scheduler.__all__) - {"LRScheduler"}))
def test_schedulers_of_torch_are_plain_data(name: str, tmp_path: Path) -> None:
    scheduler = schedulers()[name]
    scheduler.optimizer.step()
    scheduler.step(*[1.0] if name == "ReduceLROnPlateau" else [])
    checkpointer(tmp_path, scheduler=scheduler).save(1)
    fresh = schedulers()[name]
    checkpointer(tmp_path, scheduler=fresh).load()
    assert fresh.state_dict() == scheduler.state_dict()


def test_random_states_are_plain_data(tmp_path: Path) -> None:
    one = checkpointer(tmp_path)
    np.random.standard_normal()  # caches a second number
    one.save(1)
    expected = random.random(), np.random.standard_normal(3).tolist(), np.random.rand(3).tolist(), torch.rand(3)
    one.load()
    found = random.random(), np.random.standard_normal(3).tolist(), np.random.rand(3).tolist(), torch.rand(3)
    assert found[:-1] == expected[:-1]
    assert torch.equal(found[-1], expected[-1])


def test_reads_a_random_state_with_an_array_if_arrays_are_allowed(
    tmp_path: Path,
) -> None:
    """As earlier versions saved it."""
    one = checkpointer(tmp_path)
    folder = Path(str(one.save(1)))
    put(folder, "random.0.numpy", saved(np.random.get_state()))
    seal(folder)
    expected = np.random.rand()
    with pytest.raises(ValueError, match=r"random\.0\.numpy holds .*numpy\.ndarray"):
        one.load()
    arrays = [np.ndarray, np.dtype, np._core.multiarray._reconstruct, type(np.dtype("uint32"))]  # type: ignore[attr-defined]
    with torch.serialization.safe_globals(arrays[:-1]), pytest.raises(ValueError, match="UInt32DType"):
        one.load()
    with torch.serialization.safe_globals(arrays):
        one.load()
    assert np.random.rand() == expected


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_restricts_the_index_of_one_rank(tmp_path: Path) -> None:
    state = {"x": 1}
    dcp.save(state, checkpoint_id=tmp_path / "a")
    (tmp_path / "a" / ".metadata").rename(tmp_path / "a" / "__0.metadata")
    reader = Files(tmp_path / "a").reader()
    dcp.load(loaded := {"x": 0}, storage_reader=reader)
    assert loaded == state
    storage = reader.read_metadata(rank=0).storage_meta
    assert storage is not None
    assert storage.load_id == reader.load_id
    (tmp_path / "a" / "__0.metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    with pytest.raises(dcp.api.CheckpointException, match=r"names _?io\.open"):
        dcp.load(loaded, storage_reader=Files(tmp_path / "a").reader())
    assert not (tmp_path / "executed").exists()
