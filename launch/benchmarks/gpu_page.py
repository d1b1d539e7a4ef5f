"""The page of launch/gpu_report.sh: on what and how its sections ran, and what they wrote."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
LINES_OF_OUTPUT, LINES_OF_ERRORS = 300, 80
"""How many lines of a section the page shows, from the last."""
# What timeout(1) exits with, the second if it had to kill the command.
_STOPPED = (124, 137)


@dataclass(frozen=True)
class Section:
    """One command of the report."""

    title: str
    skipped: str = ""
    """Why it did not run, in words; empty if it did."""
    command: tuple[str, ...] = ()
    limit: int = 0
    """Seconds that it was given."""
    seconds: int = 0
    """Seconds that it took."""
    status: int = 0
    output: str = ""
    errors: str = ""

    @classmethod
    def read(cls, folder: Path) -> Section:
        """Read the files that the script left: one for each field."""
        title = (folder / "title").read_text()
        if (folder / "skipped").exists():
            return cls(title, (folder / "skipped").read_text())
        command = (folder / "command").read_bytes().decode().split("\0")[:-1]
        limit, seconds, status = (int((folder / name).read_text()) for name in ("limit", "seconds", "status"))
        output, errors = ((folder / name).read_text(errors="replace") for name in ("output", "errors"))
        return cls(title, "", tuple(command), limit, seconds, status, output, errors)

    @property
    def result(self) -> str:
        """What became of it, in words."""
        if self.skipped:
            return f"skipped: {self.skipped}"
        if self.status in _STOPPED and self.seconds >= self.limit:
            return f"**stopped** at the limit of {self.limit} s"
        return "ran to its end" if self.status == 0 else f"**failed** with exit status {self.status}"

    @property
    def as_markdown(self) -> str:
        """Heading, command, output as it came, and the errors if it failed."""
        blocks = [f"## {self.title}"]
        if self.skipped:
            return "\n\n".join([*blocks, f"Skipped: {self.skipped}."])
        blocks.append("    " + shlex.join(["python", *self.command[1:]]))
        if self.status:
            blocks.append(f"This section {self.result}, after {self.seconds} s.")
        if output := _last(self.output, LINES_OF_OUTPUT):
            blocks.append(output if "| --- |" in output else _fenced(output))
        if self.status and (errors := _last(self.errors, LINES_OF_ERRORS)):
            blocks += ["Its errors:", _fenced(errors)]
        return "\n\n".join(blocks)


def _last(text: str, most: int) -> str:
    """The last lines, with paths from the root of the repository."""
    lines = [line.rstrip() for line in text.replace(f"{ROOT}{os.sep}", "").strip("\n").splitlines()]
    if len(lines) > most:
        lines = [f"({len(lines) - most} lines before these are left out)", *lines[-most:]]
    return "\n".join(lines)


def _fenced(text: str) -> str:
    return f"```text\n{text.replace('```', '` ` `')}\n```"


def _said(*command: str) -> str | None:
    """What a command writes; ``None`` if it cannot run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine() -> dict[str, str]:
    """Devices, driver and versions, and the commit that ran."""
    commit, changes = _said("git", "rev-parse", "HEAD"), _said("git", "status", "--porcelain", "--untracked-files=no")
    if torch.cuda.is_available():
        every = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        counts = Counter(f"{each.name}, {each.total_memory / 2**30:.0f} GiB" for each in every)
        gpus = "; ".join(f"{count} x {name}" for name, count in counts.items())
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        drivers = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = drivers.splitlines()[0] if drivers else "not known: nvidia-smi cannot be run"
    else:
        gpus, nccl, driver = ("none",) * 3
    return {
        "GPUs": gpus,
        "driver": driver,
        "CUDA of torch": torch.version.cuda or "none",
        "NCCL": nccl,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "host": f"{platform.system()}, {platform.machine()}, {os.cpu_count()} CPU cores",
        "commit": "not known" if commit is None else commit + (", with changes not committed" if changes else ""),
    }


def read(folder: Path) -> list[Section]:
    """The sections in the order in which they ran."""
    return [Section.read(each) for each in sorted(folder.iterdir())]


def page(sections: Sequence[Section], command: str, *, is_dry_run: bool) -> str:
    """The page in Markdown.

    Args:
        sections: What ran.
        command: What the reader runs to get such a page.
        is_dry_run: Whether the sections ran on a CPU.
    """
    today = datetime.now(UTC).date().isoformat()
    failed = sum(section.status != 0 for section in sections)
    blocks = ["# On GPUs", f"Written on {today} by this command, which replaces the whole page:", f"    {command}"]
    if is_dry_run:
        blocks.append("**This is a dry run**: it ran on a CPU with the smallest sizes, and no number in it is a GPU's.")
    if failed:
        blocks.append(f"**{failed} of {len(sections)} sections failed.** What they wrote is below as it came.")
    rows = [f"| {name} | {value} |" for name, value in machine().items()]
    blocks.append("\n".join(["| | |", "| --- | --- |", *rows]))
    rows = [
        f"| {section.title} | {section.result} | {'' if section.skipped else f'{section.seconds} s'} |"
        for section in sections
    ]
    blocks.append("\n".join(["| section | result | time |", "| --- | --- | --- |", *rows]))
    return "\n\n".join([*blocks, *(section.as_markdown for section in sections)]) + "\n"
