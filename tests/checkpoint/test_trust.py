"""Loading never executes the content of a checkpoint's files, and every rank names what it refuses."""

from __future__ import annotations

import io
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict import get_state_dict

from manic.checkpoint import DamagedCheckpointError
from manic.checkpoint.safe_pickle import ALLOWED, read_metadata
from manic.inspect import inspect
from manic.testing import ranks, run
from support.forgery import put, saved, seal
from support.runs import Counter, Run, assert_identical

OPEN = r"_?io\.open"


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def forge(folder: Path, where: str, path: Path) -> None:
    """Write a bomb into a checkpoint, and update the digests in its manifest."""
    if where == "index":
        (folder / ".metadata").write_bytes(pickle.dumps(Bomb(path)))
    elif where == "inside the index":
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        metadata.storage_data[MetadataIndex("unused")] = Bomb(path)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    else:
        key, _, form = where.partition(" ")
        put(folder, key, pickle.dumps(Bomb(path)) if form else saved({"step": [Bomb(path)]}))
    seal(folder)


INDEX = ["index", "inside the index"]
NUMBERS = ["optimizer.param_groups.up.weight.lr", "optimizer.param_groups.up.weight.lr as-pickle"]
OBJECTS = ["objects.counter", "random.0.python"]
TENSORS = ["model.up.weight", "optimizer.param_groups.up.weight.mechanic", "optimizer.state.up.weight.mechanic_x_ref"]


def load_forged(layout: str, directory: str, where: str) -> None:
    started = Run(layout, "adamw", directory)
    for step in (1, 2):
        started.train(1)
        started.checkpointer.save(step)
    folder, bomb = Path(directory, "step_00000002"), Path(directory, "executed")
    if dist.get_rank() == 0:
        forge(folder, where, bomb)
    dist.barrier()
    started.train(1)
    before = started.result()
    is_object = where in NUMBERS + OBJECTS
    error, words = (ValueError, "is not loaded: rank") if is_object else (DamagedCheckpointError, "is damaged: ")
    # Torch's error for data that torch.save did not write does not name the class.
    name = "data that torch refuses" if where.endswith("as-pickle") else OPEN
    match = rf"step_00000002 {words}.*{re.escape(where.split()[0]) if where not in INDEX else 'metadata'}.*{name}"
    for verify in ("full", "off"):
        with pytest.raises(error, match=match):
            started.checkpointer.load(verify=verify)
    if where not in TENSORS[::2]:  # those are read in place
        assert_identical(started.result(), before)
    if is_object:  # no fallback: the checkpoint loads after its class is allowed
        with pytest.raises(ValueError, match=match):
            started.checkpointer.load(fallback=True)
    else:
        assert started.checkpointer.load(fallback=True).endswith("step_00000001")
        assert started.counter.step == 1
    dist.barrier()
    assert not bomb.exists()


@pytest.mark.parametrize("where", [*INDEX, *NUMBERS, *OBJECTS, *TENSORS])
@pytest.mark.parametrize(("layout", "world_size"), [("single", 1), ("fsdp2", 2)])
def test_never_executes_a_forged_pickle(
    layout: str, world_size: int, where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(load_forged, world_size, layout, str(tmp_path), where)
    for verify in ("full", "off"):
        with caplog.at_level(logging.CRITICAL):
            problems = inspect(tmp_path / "step_00000002", verify)["integrity"]["problems"]
        if where in [*OBJECTS, TENSORS[0], TENSORS[2]]:
            assert problems == []  # inspect does not read them
        else:
            name = "data that torch refuses" if where.endswith("as-pickle") else OPEN
            assert len(problems) == 1
            assert re.search(rf"cannot be read: .*{name}", problems[0])
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("where", ["inside the index", "objects.counter"])
def test_forged_pickles_execute_without_protection(where: str, tmp_path: Path) -> None:
    started = Run("single", "adamw", tmp_path)
    started.checkpointer.save(1)
    forge(tmp_path / "step_00000001", where, tmp_path / "executed")
    dcp.load({"objects": {"counter": (None,)}}, checkpoint_id=tmp_path / "step_00000001")
    assert (tmp_path / "executed").exists()


class Recorder(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        self.names = {*getattr(self, "names", ()), (module, name)}
        return super().find_class(module, name)


def save_twice(layout: str, directory: str) -> None:
    started = Run(layout, "adamw", directory)
    started.train(1)
    started.checkpointer.save(1)
    if layout != "zero1":
        state = dict(zip(("model", "optimizer"), get_state_dict(started.setup.model, started.setup.optimizer)))
        dcp.save({**state, "low": torch.ones(2, dtype=torch.bfloat16)}, checkpoint_id=Path(directory, "by_hand"))


@pytest.mark.parametrize(("layout", "world_size"), [
    ("single", 1), ("ddp", 2), ("fsdp2", 2), ("tp", 2), ("fsdp1-orig", 2), ("fsdp1-flat", 2), ("zero1", 2),
    pytest.param("hsdp", 4, marks=pytest.mark.slow), pytest.param("tp+fsdp2", 4, marks=pytest.mark.slow),
    pytest.param("mixed", 4, marks=pytest.mark.slow), pytest.param("pipeline", 4, marks=pytest.mark.slow),
    pytest.param("fsdp1-hybrid", 4, marks=pytest.mark.slow),
])  # fmt: skip
def test_allows_every_global_in_torchs_indexes(layout: str, world_size: int, tmp_path: Path) -> None:
    """Fails if torch changes the classes of an index, or a name in safe_pickle.py."""
    run(save_twice, world_size, layout, str(tmp_path))
    found = sorted(tmp_path.glob("*/.metadata"))
    assert len(found) == (1 if layout == "zero1" else 2)
    for file in found:
        recorder = Recorder(io.BytesIO(file.read_bytes()))
        metadata = recorder.load()
        assert len(recorder.names) > 10
        assert recorder.names <= ALLOWED.keys()
        assert read_metadata(file.read_bytes()) == metadata


@ranks(2)
def test_no_rank_saves_what_one_rank_could_not_load() -> None:
    import tempfile

    box = [tempfile.mkdtemp()]
    dist.broadcast_object_list(box)
    started = Run("fsdp2", "sgd", box[0])
    started.counter.step = 1 if dist.get_rank() == 0 else Counter  # type: ignore[assignment]
    for save in (started.checkpointer.save, started.checkpointer.async_save):
        with pytest.raises(ValueError, match=r"objects\.counter holds support\.runs\.Counter"):
            save(1)
    assert list(Path(box[0]).iterdir()) == []
    started.counter.step = 1
    assert started.checkpointer.save(1)
