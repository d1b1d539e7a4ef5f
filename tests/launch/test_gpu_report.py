"""launch/gpu_report.sh writes its page on a CPU, and shows what failed."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmark
from benchmarks import gpu, gpu_page

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "gpu.md"
SECTIONS = [
    "GPU tests",
    "Host syncs of a step",
    "A step in a CUDA graph",
    "A step, 25M parameters",
    'A step, 1B parameters, `Mechanic(AdamW), variant="optax", nonfinite="ignore"`',
    "A step, 10,000 small tensors",
    "Training with and without, one GPU",
    "Training with and without, all GPUs",
]


def report(*arguments: str | Path, python: str | Path = sys.executable) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "launch" / "gpu_report.sh"), "--python", str(python), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=800)


def interpreter(folder: Path, gpus: int, cases: str = "") -> Path:
    """An interpreter that only notes its arguments, sees so many GPUs, and does as the shell's ``cases`` say."""
    file = folder / "python"
    file.write_text(f"""#!/bin/sh
echo "$*" >>{folder}/calls
case "$*" in
*device_count*) echo {gpus} ;;
{cases}
*) echo "nothing ran" ;;
esac
""")
    file.chmod(0o755)
    return file


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dry_run_walks_through_every_section(tmp_path: Path) -> None:
    before = PAGE.read_bytes()
    done = report("--dry-run", "--output", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + page
    assert PAGE.read_bytes() == before
    assert re.findall("^## (.*)", page, re.MULTILINE) == SECTIONS
    assert "This is a dry run" in page
    parts = dict(zip(SECTIONS, re.split("^## ", page, flags=re.MULTILINE)[1:]))
    assert re.search(r"\d+ skipped", parts["GPU tests"])
    assert "torch sees no CUDA device" in parts["GPU tests"]
    for title in SECTIONS[1:3]:
        assert "| needs a GPU |" in parts[title]
        assert all(f'| variant="{variant}"' in parts[title] for variant in gpu.VARIANTS)
    for title in SECTIONS[3:6]:
        assert "| AdamW, fused |" in parts[title]
    assert '\n| Mechanic(AdamW), variant="optax", nonfinite="ignore" |' in parts[SECTIONS[4]]
    assert "\n| mechanic | " in parts["Training with and without, one GPU"]
    assert "Skipped: needs two or more GPUs, and there are 0." in parts["Training with and without, all GPUs"]
    for name, value in gpu_page.machine().items():
        assert name == "commit" or f"\n| {name} | {value} |\n" in page


def test_a_section_that_fails_or_takes_too_long_is_in_the_page(tmp_path: Path) -> None:
    cases = f"""*gpu-page*) exec {sys.executable} "$@" ;;
*gpu-syncs*) echo "half of it"; echo "it broke" >&2; exit 3 ;;
*gpu-capture*) exec sleep 200 ;;"""
    python = interpreter(tmp_path, 1, cases)
    done = report("--output", tmp_path / "page.md", "--limit", "5", python=python)
    page = (tmp_path / "page.md").read_text()
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed: Host syncs of a step; A step in a CUDA graph" in done.stderr
    assert f"**2 of {len(SECTIONS) + 3} sections failed.**" in page
    assert "| Host syncs of a step | **failed** with exit status 3 |" in page
    assert "```text\nhalf of it\n```\n\nIts errors:\n\n```text\nit broke\n```" in page
    assert "| A step in a CUDA graph | **stopped** at the limit of 5 s |" in page
    assert "| Training with and without, one GPU | ran to its end |" in page
    assert "dry run" not in page


@pytest.mark.parametrize("gpus", [1, 2])
def test_every_gpu_is_used(gpus: int, tmp_path: Path) -> None:
    done = report("--output", tmp_path / "page.md", python=interpreter(tmp_path, gpus))
    assert done.returncode == 0, done.stderr
    steps = [call for call in calls(tmp_path) if "benchmark.py step" in call]
    assert all("--device cuda" in call for call in steps)
    for size, count in (("25M", 1), ("1B", 4), ("10k-small", 1)):
        assert sum(f"--params {size}" in call for call in steps) == count
    trained = [call for call in calls(tmp_path) if "benchmark.py train" in call]
    assert [re.findall(r"--ranks (\d+) .*--batch-size (\d+)", call)[0] for call in trained] == [
        (str(ranks), str(16 * ranks)) for ranks in range(1, gpus + 1)
    ]
    assert ("skipped: needs two or more GPUs, and there are 1" in done.stdout) == (gpus == 1)
    assert "--dry-run" not in calls(tmp_path)[-1]


def test_refuses_to_report_without_a_gpu(tmp_path: Path) -> None:
    done = report("--output", tmp_path / "page.md", python=interpreter(tmp_path, 0))
    assert done.returncode == 1
    assert "torch sees no CUDA device" in done.stderr
    assert len(calls(tmp_path)) == 1


@pytest.mark.parametrize(
    "arguments", [(), ("--output", PAGE), ("--output", ROOT / "tests" / ".." / "docs" / "gpu.md")], ids=str
)
def test_a_dry_run_leaves_the_page_of_the_docs(arguments: tuple[str | Path, ...], tmp_path: Path) -> None:
    before = PAGE.read_bytes()
    done = report("--dry-run", *arguments, python=interpreter(tmp_path, 1))
    assert done.returncode == 2
    assert "--dry-run needs --output FILE, and another file" in done.stderr
    assert PAGE.read_bytes() == before
    assert not (tmp_path / "calls").exists()


def test_refuses_a_file_that_it_cannot_write_before_anything_runs(tmp_path: Path) -> None:
    for output in (tmp_path / "missing" / "page.md", tmp_path):
        done = report("--output", output, python=interpreter(tmp_path, 1))
        assert done.returncode == 2
        assert "cannot write" in done.stderr
    assert not (tmp_path / "calls").exists()


def never(step: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: None


def test_replays_are_compared_with_eager_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    for row in gpu.measure_replays(device, lambda step: step):
        assert row.are_equal
        assert row.difference == 0.0
    found = gpu.measure_replays(device, never)
    assert [row.are_equal for row in found] == [False, False]
    assert gpu.replays_table(found).count("**differ**") == 2
    monkeypatch.setattr(gpu, "measure_replays", lambda *_: found)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "gpu-capture"])
    with pytest.raises(SystemExit, match="differ from eager steps"):
        benchmark.main()


def test_host_syncs_are_counted_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step() -> None:
        assert modes[-1] == "warn"
        for message in ("called a synchronizing CUDA operation", "something else"):
            warnings.warn(message, stacklevel=1)
            warnings.warn(message, stacklevel=1)

    assert gpu.count_syncs(step) == 2
    assert modes[-1] == "default"
    found = [gpu.Syncs("a", [3], [0, 1], range(2)), gpu.Syncs("b", [3], [0, 1], range(1))]
    assert gpu.syncs_table(found).splitlines()[2:] == [
        "| a | 3 | 0 to 1 | 0 to 1 | as documented |",
        "| b | 3 | 0 to 1 | 0 | **not as documented** |",
    ]
    monkeypatch.setattr(gpu, "measure_syncs", lambda _: found)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "gpu-syncs"])
    with pytest.raises(SystemExit, match="than documented"):
        benchmark.main()


def test_a_page_shows_the_last_lines_of_a_long_output() -> None:
    lines = "\n".join(f"line {index}" for index in range(gpu_page.LINES_OF_OUTPUT + 2))
    text = gpu_page.Section("a", command=("python", "x"), output=f"{lines} of {ROOT}/tests ```").as_markdown
    assert "(2 lines before these are left out)\nline 2\n" in text
    assert text.endswith("of tests ` ` `\n```")
