"""manifest.json: the list of a checkpoint's files, written after all of them and checked before any is loaded.

Handles files and digests, not tensors. The file's last entry is the SHA-256 of the rest of the file, so that a damaged
manifest is detected too.
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
every byte of the index), or nothing."""


class DamagedCheckpointError(OSError):
    """A checkpoint's files differ from what was written; the message names them."""


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint and the circumstances of its save.

    Args:
        step: Number of steps taken before the save.
        world_size: Number of ranks that saved.
        layout: Number of parameters by placement, in words.
        files: Record of every file except the manifest, by name.
        manic: Version of manic that wrote it.
        torch: Version of torch that wrote it.
        time: Time of the save in UTC, ISO 8601.
        seconds: Duration of the save.
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
        """Manifest of a checkpoint that this process has just written; the arguments are the fields."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(step, world_size, layout, files, __version__, torch.__version__, time, round(seconds, 3))

    @property
    def bytes(self) -> int:
        """Total length of all files."""
        return sum(record.bytes for record in self.files.values())

    def write(self, files: Files) -> None:
        """Write the manifest to the checkpoint's folder."""
        files.write(MANIFEST, render({"format": _FORMAT, **asdict(self)}))

    @classmethod
    def read(cls, files: Files) -> Manifest:
        """Read a checkpoint's manifest.

        Raises:
            DamagedCheckpointError: if it is missing or differs from what was written.
            ValueError: if a newer manic wrote it.
        """
        try:
            text = files.read(MANIFEST)
        except FileNotFoundError:
            raise DamagedCheckpointError(
                f'{files.root} is incomplete: it has no {MANIFEST}. If another program wrote it, pass verify="off"'
            ) from None
        except OSError as error:
            raise DamagedCheckpointError(f"{files.root} is damaged: {MANIFEST} cannot be read: {error}") from error
        damaged = DamagedCheckpointError(f"{files.root} is damaged: {MANIFEST} differs from what was written")
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
                f"formats up to {_FORMAT}: install a newer version"
            )
        content["files"] = {name: FileRecord(**record) for name, record in content["files"].items()}
        return cls(**content)

    def problems(
        self, files: Files, verify: Verify, names: Iterable[str], on_bytes: Callable[[int], None] = lambda count: None
    ) -> list[str]:
        """Differences between the named files and what was written, in words; empty if there are none."""
        found = []
        for name in names:
            record = self.files[name]
            try:
                size = files.fs.size(f"{files.root}/{name}")
                if size != record.bytes:
                    found.append(f"{name} has {size} bytes; {record.bytes} were written")
                elif (verify == "full" or name == ".metadata") and record_of(files, name, on_bytes) != record:
                    found.append(f"{name} differs from what was written: its SHA-256 does not match")
            except FileNotFoundError:
                found.append(f"{name} is missing")
            except Exception as error:  # a URL's file system may raise any type, and other ranks wait for this one
                found.append(f"{name} cannot be read: {error}")
        return found


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def render(content: dict[str, Any]) -> bytes:
    """Content of manifest.json: ``content`` and its digest."""
    return (json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n").encode()
