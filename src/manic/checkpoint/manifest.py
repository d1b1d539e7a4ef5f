"""manifest.json: what a checkpoint consists of, written when all of it is there and checked before it is read.

It knows files and digests, and no tensors. The file's last entry is the SHA-256 of the rest of it, so that a manifest
is as safe as the files that it lists.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import torch

from manic import __version__
from manic.checkpoint.files import FileRecord, Files, record_of

__all__ = ["MANIFEST", "DamagedCheckpointError", "Manifest", "Verify", "render"]

MANIFEST = "manifest.json"
_FORMAT = 1

Verify = Literal["full", "size", "off"]
"""How much of a checkpoint is checked before it is loaded: every byte, every file's length (and
the index, which is small, whole), or nothing."""


class DamagedCheckpointError(OSError):
    """A checkpoint's files are not what was written; the message names them."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Args:
        step: After how many steps it was saved.
        world_size: On how many ranks.
        layout: How the parameters were spread over them, in words: what, and how many parameters.
        files: Every file but the manifest itself, by name.
        manic: The version that wrote it.
        torch: The version that wrote it.
        time: When, in UTC, ISO 8601.
        seconds: How long it took.
    """

    step: int
    world_size: int
    layout: dict[str, int]
    files: dict[str, FileRecord]
    manic: str
    torch: str
    time: str
    seconds: float

    @classmethod
    def now(
        cls, step: int, world_size: int, layout: dict[str, int], files: dict[str, FileRecord], seconds: float
    ) -> Manifest:
        """One of a checkpoint that this process has just written; the arguments are the fields."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(step, world_size, layout, files, __version__, torch.__version__, time, round(seconds, 3))

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(record.bytes for record in self.files.values())

    def write(self, files: Files) -> None:
        """Write it beside the files."""
        files.write(MANIFEST, render({"format": _FORMAT, **asdict(self)}))

    @classmethod
    def read(cls, files: Files) -> Manifest:
        """Read the one in a checkpoint.

        Raises:
            DamagedCheckpointError: if there is none, or it is not what was written.
            ValueError: if a newer manic wrote it.
        """
        try:
            text = files.read(MANIFEST)
        except FileNotFoundError:
            raise DamagedCheckpointError(
                f"{files.root} is incomplete: it has no {MANIFEST}. If it was not manic that wrote it, pass "
                'verify="off"'
            ) from None
        except OSError as error:
            raise DamagedCheckpointError(f"{files.root} is damaged: {MANIFEST} cannot be read: {error}") from error
        damaged = DamagedCheckpointError(f"{files.root} is damaged: {MANIFEST} is not what was written")
        try:
            content = json.loads(text)
            digest = content.pop("sha256")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise damaged from None
        if text != render(content) or digest != _digest(content):
            raise damaged
        written_as = content.pop("format")
        if written_as > _FORMAT:
            raise ValueError(
                f"{files.root} has format {written_as}, written by manic {content.get('manic')}; this manic reads "
                f"formats up to {_FORMAT}: install a newer one"
            )
        content["files"] = {name: FileRecord(**record) for name, record in content["files"].items()}
        return cls(**content)

    def problems(
        self, files: Files, verify: Verify, names: Iterable[str], on_bytes: Callable[[int], None] = lambda count: None
    ) -> list[str]:
        """What is wrong with the files of these names, in words; nothing, if they are what was written."""
        found = []
        for name in names:
            record = self.files[name]
            try:
                size = files.fs.size(f"{files.root}/{name}")
                if size != record.bytes:
                    found.append(f"{name} has {size} bytes, {record.bytes} were written")
                elif (verify == "full" or name == ".metadata") and record_of(files, name, on_bytes) != record:
                    found.append(f"{name} has other content than was written: its SHA-256 differs")
            except FileNotFoundError:
                found.append(f"{name} is missing")
            except Exception as error:  # of whatever kind a URL's file system raises; other ranks are waiting
                found.append(f"{name} cannot be read: {error}")
        return found


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def render(content: dict[str, Any]) -> bytes:
    """What manifest.json holds: ``content``, sealed with its digest."""
    return (json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n").encode()
