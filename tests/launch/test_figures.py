"""launch/figures.sh makes the figures of the pages: with their commands, in another folder, and says what failed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PICTURE = b"\x89PNG"


def figures(*arguments: str | Path, python: str | Path = sys.executable) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "launch" / "figures.sh"), "--python", str(python), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200)


def interpreter(folder: Path, body: str) -> Path:
    """An interpreter that runs these lines of shell."""
    file = folder / "python"
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return file


def contents() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (ROOT / "docs").rglob("*") if path.is_file()}


def made(name: str, folder: Path) -> str:
    """What the figure's command printed."""
    command, empty, *lines = (folder / f"{name}.txt").read_text().splitlines()
    assert command.startswith("OMP_NUM_THREADS=")
    assert empty == ""
    return "\n".join(lines)


def normalised(words: list[str]) -> tuple[str, ...]:
    """A command of launch/benchmark.py without the folders of its files."""
    return tuple(Path(word).name if word.endswith((".png", ".jsonl")) else word for word in words)


@pytest.mark.timeout(900)
def test_quick_figures_go_to_the_folder_and_leave_the_pages(tmp_path: Path) -> None:
    before = contents()
    done = figures("--quick", "--output", tmp_path, "step", "tuning-held-out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents() == before
    assert "| AdamW, fused |" in made("step", tmp_path)
    assert re.search(r"^\| multiplicative \| 32 \|", made("tuning-held-out", tmp_path), re.MULTILINE)
    for name in ("step", "tuning-profile", "sweeps"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PICTURE), name
    assert not (tmp_path / "host.txt").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_quick_makes_all_figures(tmp_path: Path) -> None:
    done = figures("--quick", "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for file in tmp_path.glob("*.txt"):
        assert made(file.stem, tmp_path) or file.stem.startswith("run"), file
    assert "| 1M | 1 |" in made("checkpoint", tmp_path)
    assert "19 of 19 tasks" in made("tuning-named", tmp_path)
    for name in ("run", "tuning"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PICTURE), name


def test_every_benchmark_that_a_page_names_is_made_with_the_same_options(tmp_path: Path) -> None:
    done = figures("--output", tmp_path / "figures", python=interpreter(tmp_path, "exit 0"))
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(file.read_text().splitlines()[0]) for file in (tmp_path / "figures").glob("*.txt")]
    there = {normalised(words[3:]) for words in commands if words[2] == "launch/benchmark.py"}
    text = "\n".join(page.read_text() for page in PAGES)
    named = re.findall(r"python launch/benchmark\.py ([a-z][^`\n]*?)(?:[`\n]|\.?$)", text, re.MULTILINE)
    assert len(named) > 8
    for command in named:
        if "NAME" in command.split():  # a method that a reader is to add
            continue
        assert normalised(shlex.split(command)) in there, command


def test_the_page_of_figures_has_every_name_and_picture() -> None:
    page = (ROOT / "docs" / "appendix" / "figures.md").read_text()
    rows = re.findall(r"^\| (.*) \| (.*) \| .* \|$", page, re.MULTILINE)[1:]
    refused = figures("nothing").stderr
    names = set(refused.rpartition("there are: ")[2].split())
    assert {name for _, made_by in rows if "none" not in made_by for name in re.findall("`([^`]*)`", made_by)} == names
    for picture in (ROOT / "docs" / "images").glob("*.png"):
        assert f"`{picture.name}`" in page, picture


def test_a_figure_that_fails_is_named_and_the_others_are_made(tmp_path: Path) -> None:
    python = interpreter(
        tmp_path, 'case "$*" in *latency*) echo half; echo "it broke" >&2; exit 3 ;; *) echo whole ;; esac'
    )
    done = figures("--output", tmp_path / "figures", python=python)
    assert done.returncode == 1
    assert "failed: latency\n" in done.stderr
    assert made("latency", tmp_path / "figures") == "half"
    assert (tmp_path / "figures" / "latency.errors").read_text() == "it broke\n"
    assert made("scale", tmp_path / "figures") == "whole"


@pytest.mark.parametrize(("arguments", "message"), [
    (["nothing"], "no figure nothing; there are: step "), (["--fast"], "unknown option --fast"),
    (["--output"], "--output needs a value"),
])  # fmt: skip
def test_refuses_what_it_does_not_know(arguments: list[str], message: str) -> None:
    done = figures(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
