"""What is written down twice in the project agrees: versions, and what CI calls of .ci/run."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import manic

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None, f"{package} is not in constraints.txt"
    return found[1]


def matrix_of(workflow: str) -> list[str]:
    """The parts that a job's matrix lists, as in ``part: [lint, docs]``."""
    return [part for row in re.findall(r"^ *part: \[(.*)\]$", workflow, re.MULTILINE) for part in row.split(", ")]


def test_pre_commit_runs_the_ruff_that_ci_runs() -> None:
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"ruff-pre-commit\n +rev: v(\S+)", config) == [pinned("ruff")]


def test_the_version_is_in_one_place_of_the_code_and_has_a_changelog() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"] == {"path": "src/manic/__init__.py"}
    headings = re.findall(r"^## \[?(\d+\.\d+\.\d+)", (ROOT / "docs" / "changelog.md").read_text(), re.MULTILINE)
    assert headings[0] == manic.__version__
    assert headings == sorted(headings, key=lambda version: [int(part) for part in version.split(".")], reverse=True)
    written = [path.name for path in ROOT.glob("src/**/*.py") if re.search(r'__version__ *= *"', path.read_text())]
    assert written == ["__init__.py"]
    citation = (ROOT / ".github" / "CITATION.cff").read_text()
    assert f"\nversion: {manic.__version__}\n" in citation


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_every_part_of_ci_run_that_a_workflow_calls_exists(workflow: Path) -> None:
    script, text = (ROOT / ".ci" / "run").read_text(), workflow.read_text()
    parts = set(re.findall(r"^(\w+)\(\) \{", script, re.MULTILINE))
    called = [word for call in re.findall(r"\.ci/run((?: [\w-]+)*)", text) for word in call.split()]
    if ".ci/run ${{ matrix.part }}" in text:
        called += matrix_of(text)
        assert matrix_of(text)
    assert set(called) <= parts
    for script_of_launch in re.findall(r"launch/\w+\.\w+", text):
        assert (ROOT / script_of_launch).is_file()


def test_the_workflow_of_every_push_runs_every_part() -> None:
    default = re.search(r"set -- (.*)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert default is not None
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    called = {*matrix_of(text), *re.findall(r"\.ci/run (\w+)", text)}
    assert called == set(default[1].split())
