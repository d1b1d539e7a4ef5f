"""Files of a checkpoint, local or behind an fsspec URL, with a digest of every written file.

Handles bytes and paths; does not interpret content.
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

_CHUNK = 1 << 22  # bytes read at a time for a digest


@dataclass(frozen=True)
class FileRecord:
    """A file's length in bytes and its SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


@contextmanager
def _os_errors() -> Iterator[None]:
    """Convert every error to an OSError that pickles: DCP sends errors to other ranks, which hang if that fails."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and type(error).__module__ == "builtins":
            raise
        raise OSError(getattr(error, "errno", None), f"{type(error).__name__}: {error}") from error


class _OSErrors:
    """A file system or stream of any library, with every error converted to an OSError."""

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
    """The file system that DCP reads and writes through; keeps a record of every file written.

    Args:
        url: A local path, or a URL that fsspec supports.
        on_bytes: Called with the number of bytes after each write, possibly on another thread.
    """

    def __init__(self, url: str | os.PathLike[str], on_bytes: Callable[[int], None] | None = None) -> None:
        fs, self.root = url_to_fs(os.fspath(url))
        self.fs: AbstractFileSystem = _OSErrors(fs)
        self.is_local = type(fs) is LocalFileSystem
        self.records: dict[str, FileRecord] = {}
        self._on_bytes = on_bytes or (lambda count: None)

    def writer(self) -> FileSystemWriter:
        """A storage writer for ``dcp.save``: one file per rank in the root, flushed to disk before the save returns."""
        # A URL's files have nothing to sync; torch would then sync all disks of the machine.
        writer = FileSystemWriter(self.root, sync_files=self.is_local)
        writer.fs, writer.path = self, self.root  # type: ignore[assignment]
        return writer

    def reader(self) -> Reader:
        """A storage reader for ``dcp.load``."""
        reader = Reader(self.root)
        reader.fs, reader.path = self, self.root  # type: ignore[assignment]
        return reader

    def read(self, name: str) -> bytes:
        """Content of one file."""
        with self.fs.open(f"{self.root}/{name}", "rb") as stream:
            content: bytes = stream.read()
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write one file; on a local disk, flush it."""
        with self.fs.open(f"{self.root}/{name}", "wb") as stream:
            stream.write(content)
            if self.is_local:
                stream.flush()
                os.fsync(stream.fileno())

    # The methods below implement FileSystemBase for the writer and reader above.

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Open a stream; written bytes are digested."""
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
        """Path of a file in a directory."""
        return f"{os.fspath(path)}/{suffix}"

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file and its record."""
        path, new_path = os.fspath(path), os.fspath(new_path)
        if self.is_local:
            os.replace(path, new_path)
        else:
            self.fs.mv(path, new_path)
        if os.path.basename(path) in self.records:
            self.records[os.path.basename(new_path)] = self.records.pop(os.path.basename(path))

    def init_path(self, path: str | os.PathLike[str]) -> str:
        """The path unchanged."""
        return os.fspath(path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Create a directory and its parents."""
        self.fs.makedirs(os.fspath(path), exist_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether fsspec supports this path or URL."""
        try:
            url_to_fs(os.fspath(checkpoint_id))
        except (ValueError, ImportError):
            return False
        return True

    def exists(self, path: str | os.PathLike[str]) -> bool:
        """Whether the file or directory exists."""
        return bool(self.fs.exists(os.fspath(path)))

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        """Remove a file."""
        self.fs.rm(os.fspath(path))


class _DigestingStream(io.IOBase):
    """Forwards written bytes to ``raw`` and updates a digest."""

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
        self._raw.flush()  # the caller syncs the file next
        number: int = self._raw.fileno()
        return number

    def close(self) -> None:
        self._raw.close()
        super().close()


def record_of(files: Files, name: str, on_bytes: Callable[[int], None]) -> FileRecord:
    """Read a file and compute its record.

    Raises:
        OSError: if the file cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    with files.fs.open(f"{files.root}/{name}", "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            on_bytes(len(chunk))
    return FileRecord(size, digest.hexdigest())
