"""Restricted unpickling of checkpoints: tensors, plain data and DCP's index; no other global is imported or called.

``.metadata`` is one pickle, every entry of a ``.distcp`` file another. Follows how DCP reads them.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any, cast

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint._traverse import set_element  # used by torch's planner; test_safe_pickle.py
from torch.distributed.checkpoint.filesystem import _StorageInfo  # in every .metadata; test_safe_pickle.py
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,  # in every .metadata too
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

__all__ = ["ALLOWED", "Reader", "RefusedError", "SafePlanner", "check_loadable", "read_metadata"]

_ADVICE = (
    "Only tensors and plain Python data are loaded. If you trust its author, allow the classes with "
    "torch.serialization.add_safe_globals"
)


class RefusedError(pickle.UnpicklingError):
    """An entry holds a class that is not allowed; the message names both."""


class Reader(FileSystemReader):
    """Torch's reader with restricted unpickling of ``.metadata``; torch's own is unrestricted."""

    def read_metadata(self, *_: Any, **kwargs: Any) -> Metadata:
        """DCP's index; of one rank if DCP passes ``rank``, as it does without an index of all ranks.

        Raises:
            pickle.UnpicklingError: if the file is not an index.
        """
        rank = kwargs.get("rank")
        path = self.fs.concat_path(self.path, ".metadata" if rank is None else f"__{rank}.metadata")
        with self.fs.create_stream(path, "rb") as stream:
            metadata = read_metadata(stream.read())
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the planned items; an error names the entry that is not a tensor, which torch's does not."""
        try:
            return super().read_data(plan, planner)
        except RefusedError:
            raise
        except pickle.UnpicklingError as error:
            raise pickle.UnpicklingError(self._not_a_tensor(plan) or str(error)) from None

    def _not_a_tensor(self, plan: LoadPlan) -> str | None:
        for item in plan.items:
            if item.type == LoadItemType.TENSOR:
                where = self.storage_data[item.storage_index]
                with self.fs.create_stream(self.fs.concat_path(self.path, where.relative_path), "rb") as stream:
                    stream.seek(where.offset)
                    content = io.BytesIO(stream.read(where.length))
                try:
                    torch.load(content, map_location="cpu", weights_only=True)
                except pickle.UnpicklingError as error:
                    return f"{item.storage_index.fqn} is not a tensor; it holds {_disallowed(content, error)}"
        return None


class SafePlanner(DefaultLoadPlanner):
    """Torch's planner with ``weights_only=True`` for entries that are not tensors; torch's own is unrestricted."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Store one entry that is not a tensor in the state dict.

        Raises:
            RefusedError: if it holds a class that is not allowed.
        """
        name = read_item.dest_index.fqn
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], _load(name, value))
        else:
            self.state_dict[name] = _load(name, value)


def read_metadata(content: bytes) -> Metadata:
    """Unpickle DCP's index.

    Raises:
        pickle.UnpicklingError: if it names a global that is not in :data:`ALLOWED`, is not an index, or refers to files
            outside the checkpoint.
    """
    metadata = _Unpickler(io.BytesIO(content)).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f".metadata is a {type(metadata).__name__}, not an index")
    for where in (metadata.storage_data or {}).values():
        path = PurePath(where.relative_path)
        if path.is_absolute() or ".." in path.parts:
            raise pickle.UnpicklingError(f".metadata refers to a file outside the checkpoint: {path}")
    return metadata


def check_loadable(entries: Iterable[tuple[str, Any]]) -> None:
    """Raise ValueError if a load would refuse one of the entries to save.

    Args:
        entries: Names and values of entries that are not tensors.
    """
    for name, value in entries:
        if not _is_plain(value):
            content = io.BytesIO()
            torch.save(value, content)
            content.seek(0)
            try:
                _load(name, content)
            except RefusedError as error:
                raise ValueError(f"not saved, because a load would refuse it: {error}") from None


def _load(name: str, content: io.BytesIO) -> Any:
    try:
        return torch.load(content, weights_only=True)
    except pickle.UnpicklingError as error:
        raise RefusedError(f"{name} holds {_disallowed(content, error)}. {_ADVICE}") from None


def _disallowed(content: io.BytesIO, error: pickle.UnpicklingError) -> str:
    """The globals that ``weights_only`` refuses, in words."""
    content.seek(0)
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(content))
    except Exception:  # torch.save did not write it
        names = []
    if names:
        return ", ".join(names)
    paragraphs = str(error).split("\n\n")  # torch puts advice before and after the reason
    return f"data that torch refuses: {paragraphs[-2] if len(paragraphs) > 2 else error}"


class _NotPlain(Exception):
    """Raised for data that is not plain."""


class _PlainPickler(pickle.Pickler):
    def reducer_override(self, thing: Any) -> Any:
        """Called by C code for every type that is not plain; a million numbers are therefore checked fast."""
        raise _NotPlain


class _NullStream:
    def write(self, data: Any) -> int:
        return len(data)


def _is_plain(value: Any) -> bool:
    if type(value) in (bool, int, float, str, type(None)):
        return True
    try:
        _PlainPickler(cast(Any, _NullStream()), protocol=2).dump(value)
    except _NotPlain:
        return False
    return True


class _StandIn:
    """Replaces a class in a pickle: creates instances, and does not let the pickle change the class."""

    target: type

    def __new__(cls) -> Any:
        return object.__new__(cls.target)

    def __setstate__(self, state: Any) -> None:
        """Never runs; its presence makes pickle's BUILD on this class fail instead of setting attributes."""


def _stand_in(target: type) -> type:
    return type(target.__name__, (_StandIn,), {"target": target})


class _Properties(TensorProperties):
    """As :class:`_StandIn`, with the memory format as a number: a pickle could change an enum's member too."""

    def __setstate__(self, state: Any) -> None:
        dtype, layout, requires_grad, memory_format, pin_memory = state
        encoding = _MEM_FORMAT_ENCODING(memory_format)
        super().__setstate__((dtype, layout, requires_grad, encoding, pin_memory))  # type: ignore[no-untyped-call]
        self.__class__ = TensorProperties  # type: ignore[assignment]


class _MemoryFormat:
    """Replaces the enum, and ``getattr``, with which Python 3.11.2 pickles an enum's member."""

    __slots__ = ()

    def __call__(self, *arguments: Any) -> int:
        return _MEMORY_FORMATS[arguments[-1]]


class _Path:
    """Replaces all path classes: the path of the save, which is not used."""

    __slots__ = ()

    def __call__(self, *parts: str) -> PurePath:
        return PurePath(*parts)


_MEMORY_FORMATS: dict[str | int, int] = {
    key: each.value for each in _MEM_FORMAT_ENCODING for key in (each.name, each.value)
}
_METADATA = "torch.distributed.checkpoint.metadata"
_OLDER = "torch.distributed._shard.sharded_tensor.metadata"  # their module in older versions of torch
_LAYOUTS = {str(each): each for each in vars(torch).values() if isinstance(each, torch.layout)}

ALLOWED: dict[tuple[str, str], Any] = {
    (_METADATA, "BytesStorageMetadata"): _stand_in(BytesStorageMetadata),
    (_METADATA, "ChunkStorageMetadata"): _stand_in(ChunkStorageMetadata),
    (_METADATA, "Metadata"): _stand_in(Metadata),
    (_METADATA, "MetadataIndex"): _stand_in(MetadataIndex),
    (_METADATA, "StorageMeta"): _stand_in(StorageMeta),
    (_METADATA, "TensorStorageMetadata"): _stand_in(TensorStorageMetadata),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _stand_in(_StorageInfo),
    (_METADATA, "TensorProperties"): _Properties,
    (_OLDER, "TensorProperties"): _Properties,
    (_METADATA, "_MEM_FORMAT_ENCODING"): _MemoryFormat(),
    (_OLDER, "MEM_FORMAT_ENCODING"): _MemoryFormat(),
    ("builtins", "getattr"): _MemoryFormat(),
    ("torch.serialization", "_get_layout"): _LAYOUTS.__getitem__,
    ("torch", "Size"): torch.Size,
    **{("torch", name): dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)},
    **{
        (module, name): _Path()
        for module in ("pathlib", "pathlib._local")  # Python 3.13 has the latter
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
}
"""Globals that an index may name, by module and name, and their replacements."""


class _Unpickler(pickle.Unpickler):
    """Resolves only the globals in :data:`ALLOWED`; none of the replacements runs code or can be changed."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(
                f".metadata names {module}.{name}, which is not part of DCP's index; it was not imported"
            )
        return ALLOWED[module, name]
