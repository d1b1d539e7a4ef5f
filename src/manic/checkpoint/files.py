"""Files of a checkpoint, local or behind an fsspec URL, with a digest of what is written.

It knows bytes and paths, and nothing of what is in them.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystemBase

from manic.checkpoint.safe_pickle import Reader

__all__ = ["FileRecord", "Files", "record_of"]

_CHUNK = 1 << 22  # bytes read at a time to be digested


@dataclass(frozen=True)
class FileRecord:
    """How long a file is, in bytes, and its SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


@contextmanager
def _os_errors() -> Iterator[None]:
    """Make every error an OSError that can be pickled: DCP sends errors to other ranks, which wait if it cannot."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and type(error).__module__ == "builtins":
            raise
        raise OSError(getattr(error, "errno", None), f"{type(error).__name__}: {error}") from error


class _OSErrors:
    """A file system or stream, whatever library it is of, with OSErrors for errors."""

    def __init__(self, thing: Any) -> None:
        self._thing = thing

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._thing, name)
        if not callable(attribute):
            return attribute

        def call(*args: Any, **kwargs: Any) -> Any:
            with _os_errors():
                result = attribute(*args, **kwargs)
            return _OSErrors(result) if name == "open" else result

        return call

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Files(FileSystemBase):
    """What DCP reads and writes through; it notes a record of every file that it wrote.

    Args:
        url: A local path, or a URL that fsspec knows.
        on_bytes: Called with the number of bytes after each write, maybe on another thread.
    """

    def __init__(self, url: str | os.PathLike[str], on_bytes: Callable[[int], None] | None = None) -> None:
        fs, self.root = url_to_fs(os.fspath(url))
        self.fs: AbstractFileSystem = _OSErrors(fs)
        self.is_local = type(fs) is LocalFileSystem
        self.records: dict[str, FileRecord] = {}
        self._on_bytes = on_bytes or (lambda count: None)

    def writer(self) -> FileSystemWriter:
        """What ``dcp.save`` takes to write into the root: one file per rank, on the disk when the save returns."""
        # There is nothing to sync behind a URL, and torch would sync all disks of the machine instead.
        writer = FileSystemWriter(self.root, sync_files=self.is_local)
        writer.fs, writer.path = self, self.root  # type: ignore[assignment]
        return writer

    def reader(self) -> Reader:
        """What ``dcp.load`` takes to read from the root."""
        reader = Reader(self.root)
        reader.fs, reader.path = self, self.root  # type: ignore[assignment]
        return reader

    def read(self, name: str) -> bytes:
        """All of one file."""
        with self.fs.open(f"{self.root}/{name}", "rb") as stream:
            content: bytes = stream.read()
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write one file, and on a local disk wait until it is there."""
        with self.fs.open(f"{self.root}/{name}", "wb") as stream:
            stream.write(content)
            if self.is_local:
                stream.flush()
                os.fsync(stream.fileno())

    # What follows is FileSystemBase, with paths as the writer and reader above build them.

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """A stream; one that is written to is digested on its way."""
        path = os.fspath(path)
        raw = self.fs.open(path, mode)
        stream = _DigestingStream(raw, self._on_bytes) if "w" in mode else raw
        try:
            yield stream
        finally:
            stream.close()
        if isinstance(stream, _DigestingStream):
            self.records[os.path.basename(path)] = FileRecord(stream.size, stream.digest.hexdigest())

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        """A file's path in a directory."""
        return f"{os.fspath(path)}/{suffix}"

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file, with its record."""
        path, new_path = os.fspath(path), os.fspath(new_path)
        if self.is_local:
            os.replace(path, new_path)
        else:
            self.fs.mv(path, new_path)
        if os.path.basename(path) in self.records:
            self.records[os.path.basename(new_path)] = self.records.pop(os.path.basename(path))

    def init_path(self, path: str | os.PathLike[str]) -> str:
        """The path as it is."""
        return os.fspath(path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Make a directory and those above it."""
        self.fs.makedirs(os.fspath(path), exist_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether fsspec knows it."""
        try:
            url_to_fs(os.fspath(checkpoint_id))
        except (ValueError, ImportError):
            return False
        return True

    def exists(self, path: str | os.PathLike[str]) -> bool:
        """Whether there is such a file or directory."""
        return bool(self.fs.exists(os.fspath(path)))

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        """Remove a file."""
        self.fs.rm(os.fspath(path))


class _DigestingStream(io.IOBase):
    """What is written goes on to ``raw`` and into a digest."""

    def __init__(self, raw: Any, on_bytes: Callable[[int], None]) -> None:
        self.digest = hashlib.sha256()
        self.size = 0
        self._raw = raw
        self._on_bytes = on_bytes

    def write(self, data: Any) -> int:
        self._raw.write(data)
        self.digest.update(data)
        count = len(data) if isinstance(data, bytes) else memoryview(data).nbytes
        self.size += count
        self._on_bytes(count)
        return count

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        if not self._raw.closed:
            self._raw.flush()

    def fileno(self) -> int:
        self._raw.flush()  # who asks is going to sync the file
        number: int = self._raw.fileno()
        return number

    def close(self) -> None:
        self._raw.close()
        super().close()


def record_of(files: Files, name: str, on_bytes: Callable[[int], None]) -> FileRecord:
    """What a file's record is now.

    Raises:
        OSError: if it cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    with files.fs.open(f"{files.root}/{name}", "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            on_bytes(len(chunk))
    return FileRecord(size, digest.hexdigest())
