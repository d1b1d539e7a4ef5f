"""Folders are published atomically, on a local disk and behind a URL without renames."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from manic.checkpoint.directory import Directory
from manic.checkpoint.files import Files
from support.bucket import Bucket  # registers bucket://


@pytest.fixture(params=["local", "bucket", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    prefix = {"local": "", "bucket": f"{Bucket.protocol}://", "memory": "memory://"}[request.param]
    yield f"{prefix}{tmp_path}/run"
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()


def save(directory: Directory, step: int) -> None:
    Files(directory.begin(step)).write("content", b"%d" % step)
    directory.publish(step)


def test_a_step_appears_when_published(url: str) -> None:
    directory = Directory(url)
    assert directory.steps() == []
    folder = directory.begin(12)
    Files(folder).write("content", b"12")
    assert directory.steps() == Directory(url).steps() == []
    directory.publish(12)
    assert directory.steps() == Directory(url).steps() == [12]
    assert Files(directory.path(12)).read("content") == b"12"


def test_never_overwrites_a_step(url: str) -> None:
    directory = Directory(url)
    save(directory, 1)
    with pytest.raises(FileExistsError, match="never overwritten"):
        directory.begin(1)
    assert Files(directory.path(1)).read("content") == b"1"


def test_the_next_save_removes_unfinished_folders(url: str) -> None:
    killed = Directory(url)
    save(killed, 1)
    for step in (2, 3):
        Files(killed.begin(step)).write("content", b"half")
    directory = Directory(url)
    assert directory.steps() == [1]
    save(directory, 3)
    assert directory.steps() == [1, 3]
    assert Files(directory.path(3)).read("content") == b"3"
    fs, root = fsspec.core.url_to_fs(url)
    assert sorted(Path(path).name for path in fs.ls(root, detail=False)) == ["step_00000001", "step_00000003"]


def test_abandon_removes_the_folder(url: str) -> None:
    directory = Directory(url)
    save(directory, 1)
    Files(directory.begin(2)).write("content", b"half")
    directory.abandon(2)
    directory.abandon(7)  # does not exist
    fs, root = fsspec.core.url_to_fs(url)
    assert [Path(path).name for path in fs.ls(root, detail=False)] == ["step_00000001"]


def test_abandon_keeps_a_complete_step(url: str) -> None:
    directory = Directory(url)
    save(directory, 1)
    directory.abandon(1)
    assert directory.steps() == [1]
    assert Files(directory.path(1)).read("content") == b"1"


def test_retire_removes_all_other_steps(url: str) -> None:
    directory = Directory(url)
    for step in range(1, 6):
        save(directory, step)
    directory.retire([2, 5])
    assert directory.steps() == [2, 5]


def test_set_aside_hides_a_step_without_removing_it(url: str) -> None:
    directory = Directory(url)
    save(directory, 1)
    aside = directory.set_aside(1)
    assert directory.steps() == []
    fs, _ = fsspec.core.url_to_fs(url)
    assert fs.cat(f"{aside}/content") == b"1"
    save(directory, 1)
    assert directory.steps() == [1]


def test_ignores_other_names(tmp_path: Path) -> None:
    for name in ("step_", "step_x", "step_1", "steps_1", "step_00000004.tmp", "notes"):
        (tmp_path / name).mkdir()
    assert Directory(tmp_path).steps() == []
    assert Directory(tmp_path / "not" / "there").steps() == []


def test_a_relative_path_survives_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    directory = Directory("run")
    monkeypatch.chdir("/")
    save(directory, 1)
    assert (tmp_path / "run" / "step_00000001").is_dir()
    assert Files(directory.path(1)).read("content") == b"1"


def test_a_leftover_that_cannot_be_removed_is_ignored(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = Directory(url)
    Files(killed.begin(2)).write("content", b"half")
    directory = Directory(url)
    fs, _ = fsspec.core.url_to_fs(url)
    remove, failed = fs.rm, []

    def fail(path: str, *args: Any, **kwargs: Any) -> None:
        if "step_00000002" in path:
            failed.append(path)
            raise PermissionError(path)
        remove(path, *args, **kwargs)

    monkeypatch.setattr(fs, "rm", fail)
    save(directory, 3)
    assert failed
    assert directory.steps() == Directory(url).steps() == [3]


def test_a_partly_removed_folder_is_not_a_step(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = Directory(url)
    save(directory, 1)
    save(directory, 2)
    fs, root = fsspec.core.url_to_fs(url)

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fs, "rm", die)
        with pytest.raises(KeyboardInterrupt):
            directory.retire([2])
    after = Directory(url)
    assert after.steps() == [2]
    save(after, 3)
    assert sorted(Path(path).name for path in fs.ls(root, detail=False)) == ["step_00000002", "step_00000003"]
