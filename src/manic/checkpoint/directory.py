"""A directory of checkpoints: one folder for each step, published atomically.

Names, publishes and removes folders, and does not read their content. On a local disk a folder is written under a
hidden name and renamed. Behind a URL, where a rename may not exist, a marker file with the hidden name exists from
before the folder's first file until after its last.
Methods must be called on one rank only.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable

from manic.checkpoint.files import Files

__all__ = ["Directory"]

logger = logging.getLogger(__name__)

_STEP = re.compile(r"step_\d+")
# Start with a dot, so that globs do not match them.
_INCOMPLETE, _REMOVED, _DAMAGED = ".incomplete_", ".removed_", ".damaged_"


class Directory:
    """A directory of checkpoints.

    Args:
        url: A local path, or a URL that fsspec supports.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self._given = os.fspath(url)  # for messages
        self._files = Files(os.fspath(url).rstrip("/"))
        self._fs, self._root = self._files.fs, self._files.root.rstrip("/")
        # A local path is absolute, so that it survives a change of the working directory.
        self.url = self._root if self._files.is_local else os.fspath(url).rstrip("/")
        self._is_clean = False

    def path(self, step: int) -> str:
        """Path or URL of the checkpoint of ``step``, whether or not it exists."""
        return f"{self.url}/{_name(step)}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        names = self._names()
        # On a local disk the hidden name is a separate folder; behind a URL it marks the visible one as incomplete.
        complete = names if self._files.is_local else {name for name in names if f"{_INCOMPLETE}{name}" not in names}
        return sorted(int(name.removeprefix("step_")) for name in complete if _is_step(name))

    def find(self, step: int | None) -> list[int]:
        """Steps to try to load, in order: ``step`` alone, or for ``None`` all steps, newest first.

        Raises:
            FileNotFoundError: if there is no such checkpoint.
        """
        steps = self.steps()
        if step is None:
            if not steps:
                raise FileNotFoundError(f"there is no checkpoint in {self._given}")
            return steps[::-1]
        if step not in steps:
            raise FileNotFoundError(f"{self.path(step)} is not a checkpoint; {self._given} has steps {steps}")
        if step < steps[-1]:
            logger.warning(
                "there are later checkpoints than %s, up to step %d: continue in another directory, or they remain "
                "the latest",
                self.path(step),
                steps[-1],
            )
        return [step]

    def begin(self, step: int) -> str:
        """Create the folder to write the checkpoint of ``step`` into; remove unfinished folders of earlier saves.

        Returns:
            Its path or URL.

        Raises:
            FileExistsError: if that step has a checkpoint.
            OSError: if the folder cannot be created.
        """
        if step in self.steps():
            raise FileExistsError(f"{self.path(step)} exists; checkpoints are never overwritten")
        if not self._is_clean:
            for name in self._names():
                if name.startswith((_INCOMPLETE, _REMOVED)):
                    self._try_to_clear(name)
            self._is_clean = True
        folder = self._unfinished(step)
        if not self._files.is_local:
            self._fs.makedirs(self._root, exist_ok=True)
            self._files.write(f"{_INCOMPLETE}{_name(step)}", b"")
        if self._fs.exists(folder):
            self._fs.rm(folder, recursive=True)
        self._fs.makedirs(folder)
        return folder if self._files.is_local else self.path(step)

    def publish(self, step: int) -> None:
        """Publish the complete folder of ``step``."""
        folder = self._unfinished(step)
        if self._files.is_local:
            _sync(folder)
            os.rename(folder, f"{self._root}/{_name(step)}")
            _sync(self._root)
        else:
            self._fs.rm(f"{self._root}/{_INCOMPLETE}{_name(step)}")

    def abandon(self, step: int) -> None:
        """Remove the folder of a failed save; log a warning if that fails."""
        self._try_to_clear(f"{_INCOMPLETE}{_name(step)}")

    def retire(self, keep: Iterable[int]) -> None:
        """Remove all checkpoints except those of the steps in ``keep``."""
        kept = set(keep)
        for step in self.steps():
            if step in kept:
                continue
            # Hide it first: a partly removed folder must not be listed as a checkpoint.
            if self._files.is_local:
                self._clear(os.path.basename(self._hide(step, _REMOVED)))
            else:
                self._files.write(f"{_INCOMPLETE}{_name(step)}", b"")
                self._clear(f"{_INCOMPLETE}{_name(step)}")

    def set_aside(self, step: int) -> str:
        """Hide the checkpoint of ``step`` without removing it; return its new path."""
        return self._hide(step, _DAMAGED)

    def _clear(self, name: str) -> None:
        """Remove a hidden folder, or a marked folder and then its marker."""
        if name not in self._names():
            return
        if not self._files.is_local and name.startswith(_INCOMPLETE):
            marked = f"{self._root}/{name.removeprefix(_INCOMPLETE)}"
            if self._fs.exists(marked):
                self._fs.rm(marked, recursive=True)
        self._fs.rm(f"{self._root}/{name}", recursive=True)

    def _try_to_clear(self, name: str) -> None:
        try:
            self._clear(name)
        except OSError as error:
            logger.warning("could not remove %s/%s: %s", self._root, name, error)

    def _names(self) -> set[str]:
        self._fs.invalidate_cache()
        try:
            return {os.path.basename(path.rstrip("/")) for path in self._fs.ls(self._root, detail=False)}
        except (FileNotFoundError, NotADirectoryError):
            return set()

    def _unfinished(self, step: int) -> str:
        return f"{self._root}/{_INCOMPLETE if self._files.is_local else ''}{_name(step)}"

    def _hide(self, step: int, prefix: str) -> str:
        source, target = f"{self._root}/{_name(step)}", f"{self._root}/{prefix}{_name(step)}"
        if self._files.is_local:
            if self._fs.exists(target):
                self._fs.rm(target, recursive=True)
            os.rename(source, target)
            return target
        self._fs.mv(source, target, recursive=True)
        return target


def _is_step(name: str) -> bool:
    return _STEP.fullmatch(name) is not None and name == _name(int(name.removeprefix("step_")))


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _sync(folder: str) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
