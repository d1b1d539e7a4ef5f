"""Checkpoints that released versions wrote are loaded, on their number of ranks and another, and the run goes on."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

import manic
from manic.testing import run
from support import versions

VERSIONS = Path(__file__).with_name("versions")
SAVED = [
    (folder.name, name)
    for folder in sorted(VERSIONS.iterdir())
    for name in json.loads((folder / versions.NEXT).read_text())
]


def unpack(version: str, directory: Path) -> None:
    with tarfile.open(VERSIONS / version / versions.ARCHIVE) as archive:
        archive.extractall(directory, filter="data")


def assert_close(outcome: dict[str, Any], stored: dict[str, Any]) -> None:
    """To the rounding of float32 over some steps, which other ranks or another torch may do in another order."""
    assert outcome["scale"] == pytest.approx(stored["scale"], rel=1e-5)
    assert outcome["parameters"].keys() == stored["parameters"].keys()
    for name, values in stored["parameters"].items():
        assert outcome["parameters"][name] == pytest.approx(values, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("version", "name"), SAVED)
def test_a_version_s_checkpoint_is_loaded_and_the_run_goes_on(
    version: str, name: str, ranks: int, tmp_path: Path
) -> None:
    unpack(version, tmp_path)
    stored = json.loads((VERSIONS / version / versions.NEXT).read_text())[name]
    for outcome in run(versions.go_on, ranks, str(tmp_path / name), name.rpartition("-")[0]):
        assert_close(outcome, stored)


def test_the_files_are_of_the_version_that_their_folder_names(tmp_path: Path) -> None:
    for version, name in SAVED:
        unpack(version, tmp_path / version)
        if not name.startswith(versions.PLAIN):
            (manifest,) = (tmp_path / version / name).glob("step_*/manifest.json")
            assert json.loads(manifest.read_text())["manic"] == version


def test_this_version_has_its_files() -> None:
    """If it has none yet, the command in tests/support/versions.py makes them."""
    assert manic.__version__ in {version for version, _ in SAVED}


def test_a_version_s_files_are_never_overwritten() -> None:
    with pytest.raises(FileExistsError, match=manic.__version__):
        versions.make(VERSIONS)


def test_a_difference_is_seen() -> None:
    """The stored numbers tell a run that goes on from one whose tuner or moments start again."""
    for version, name in SAVED:
        stored = json.loads((VERSIONS / version / versions.NEXT).read_text())[name]
        fresh = versions.Job(versions.KINDS[name.rpartition("-")[0]])
        fresh.train(range(versions.SAVED_AFTER, versions.SAVED_AFTER + versions.GOES_ON))
        with pytest.raises(AssertionError):
            assert_close(fresh.outcome(), stored)
