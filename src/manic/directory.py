"""A directory of checkpoints: a folder for every step, which appears whole or not at all.

It knows names and how a folder is put in place, and nothing of what is in one. On a local disk a folder is written
under a hidden name and renamed. Behind a URL, where there may be no renaming, it holds a marker until it is complete.
All methods are for one rank to call.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable

from manic.files import Files

__all__ = ["Directory"]

logger = logging.getLogger(__name__)

_STEP = re.compile(r"step_\d+")
# Begin with a dot, so that no glob takes them for checkpoints.
_INCOMPLETE, _REMOVED, _DAMAGED = ".incomplete_", ".removed_", ".damaged_"


class Directory:
    """A directory of checkpoints.

    Args:
        url: A local path, or a URL that fsspec knows.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self._files = Files(os.fspath(url).rstrip("/"))
        self._fs, self._root = self._files.fs, self._files.root.rstrip("/")
        # A local one stays where it is when the process changes its working directory.
        self.url = self._root if self._files.is_local else os.fspath(url).rstrip("/")
        self._is_clean = False

    def path(self, step: int) -> str:
        """Where the checkpoint of ``step`` is, or would be."""
        return f"{self.url}/{_name(step)}"

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, ascending."""
        return sorted(self._step_of(name) for name in self._step_names() - self._marked())

    def begin(self, step: int) -> str:
        """Make the folder to write the checkpoint of ``step`` into; what earlier saves left unfinished goes.

        Returns:
            Its path, or URL.

        Raises:
            FileExistsError: if there is a checkpoint of that step.
            OSError: if it cannot be made.
        """
        if step in self.steps():
            raise FileExistsError(f"{self.path(step)} exists; checkpoints are never written over")
        folder = self._unfinished(step)
        if not self._is_clean:
            hidden = {name for name in self._names() if name.startswith((_INCOMPLETE, _REMOVED))}
            for name in hidden | self._marked():
                self._fs.rm(f"{self._root}/{name}", recursive=True)
            self._is_clean = True
        elif self._fs.exists(folder):
            self._fs.rm(folder, recursive=True)
        self._fs.makedirs(folder)
        if not self._files.is_local:
            self._files.write(f"{_name(step)}/{_INCOMPLETE}", b"")
        return folder if self._files.is_local else self.path(step)

    def publish(self, step: int) -> None:
        """The folder of ``step`` is complete: let it appear."""
        folder = self._unfinished(step)
        if self._files.is_local:
            _sync(folder)
            os.rename(folder, f"{self._root}/{_name(step)}")
            _sync(self._root)
        else:
            self._fs.rm(f"{folder}/{_INCOMPLETE}")

    def abandon(self, step: int) -> None:
        """Remove what there is of a folder that will not be completed, if that is possible."""
        try:
            if self._files.is_local or _name(step) in self._marked():  # without the marker, it is complete
                self._fs.rm(self._unfinished(step), recursive=True)
        except OSError as error:
            logger.debug("could not remove %s: %s", self._unfinished(step), error)

    def retire(self, keep: Iterable[int]) -> None:
        """Remove all checkpoints but those of the steps in ``keep``."""
        kept = set(keep)
        for step in self.steps():
            if step not in kept:
                # Out of sight first: what is half removed must not look like a checkpoint.
                self._fs.rm(self._hide(step, _REMOVED), recursive=True)

    def set_aside(self, step: int) -> str:
        """Take the checkpoint of ``step`` out of the steps without removing it; return where it is now."""
        return self._hide(step, _DAMAGED)

    def _names(self) -> set[str]:
        self._fs.invalidate_cache()
        try:
            return {os.path.basename(path.rstrip("/")) for path in self._fs.ls(self._root, detail=False)}
        except (FileNotFoundError, NotADirectoryError):
            return set()

    def _step_names(self) -> set[str]:
        return {name for name in self._names() if _STEP.fullmatch(name) and name == _name(self._step_of(name))}

    def _step_of(self, name: str) -> int:
        return int(name.removeprefix("step_"))

    def _marked(self) -> set[str]:
        """The names of folders that hold a marker."""
        if self._files.is_local:
            return set()
        return {name for name in self._step_names() if self._fs.exists(f"{self._root}/{name}/{_INCOMPLETE}")}

    def _unfinished(self, step: int) -> str:
        return f"{self._root}/{_INCOMPLETE if self._files.is_local else ''}{_name(step)}"

    def _hide(self, step: int, prefix: str) -> str:
        source, target = f"{self._root}/{_name(step)}", f"{self._root}/{prefix}{_name(step)}"
        if self._files.is_local:
            if self._fs.exists(target):
                self._fs.rm(target, recursive=True)
            os.rename(source, target)
            return target
        if prefix == _REMOVED:  # the marker does the same there, and copies nothing
            self._files.write(f"{_name(step)}/{_INCOMPLETE}", b"")
            return source
        self._fs.mv(source, target, recursive=True)
        return target


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _sync(folder: str) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
