"""What a checkpoint's pickles may bring: tensors, plain data and DCP's index. Nothing that they ask for is called.

``.metadata`` is one pickle, every entry of a ``.distcp`` file another. It knows how DCP reads them, and no model.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any, cast

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint._traverse import set_element  # as torch's planner does it; test_safe_pickle.py
from torch.distributed.checkpoint.filesystem import _StorageInfo  # in every .metadata; test_safe_pickle.py
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,  # in every .metadata, too
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

__all__ = ["ADMITTED", "Reader", "RefusedError", "SafePlanner", "check_loadable", "read_metadata"]

_WAY_OUT = (
    "Only tensors and plain Python data are loaded. If you trust whoever wrote it, name the classes to "
    "torch.serialization.add_safe_globals"
)


class RefusedError(pickle.UnpicklingError):
    """An entry that is no tensor holds something else than plain data; the message names both."""


class Reader(FileSystemReader):
    """Torch's reader, which unpickles ``.metadata`` without restraint, with restraint."""

    def read_metadata(self, *_: Any, **kwargs: Any) -> Metadata:
        """DCP's index; ``rank``, which DCP passes where there is none for all, asks for that of one rank.

        Raises:
            pickle.UnpicklingError: if it is none.
        """
        rank = kwargs.get("rank")
        path = self.fs.concat_path(self.path, ".metadata" if rank is None else f"__{rank}.metadata")
        with self.fs.create_stream(path, "rb") as stream:
            metadata = read_metadata(stream.read())
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what is planned; torch's own error for a tensor that is none does not say which."""
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
                    return f"{item.storage_index.fqn} is no tensor, but holds {_what(content, error)}"
        return None


class SafePlanner(DefaultLoadPlanner):
    """Torch's planner, which unpickles what is no tensor without restraint, with ``weights_only=True``."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put one entry that is no tensor into its place.

        Raises:
            RefusedError: if it is more than plain data.
        """
        name = read_item.dest_index.fqn
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], _load(name, value))
        else:
            self.state_dict[name] = _load(name, value)


def read_metadata(content: bytes) -> Metadata:
    """Unpickle DCP's index.

    Raises:
        pickle.UnpicklingError: if it asks for anything that an index does not consist of, is no index, or has entries
            in files outside of the checkpoint.
    """
    metadata = _Unpickler(io.BytesIO(content)).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f".metadata is a {type(metadata).__name__}, not the index of a checkpoint")
    for where in (metadata.storage_data or {}).values():
        path = PurePath(where.relative_path)
        if path.is_absolute() or ".." in path.parts:
            raise pickle.UnpicklingError(f".metadata asks for a file outside of the checkpoint: {path}")
    return metadata


def check_loadable(entries: Iterable[tuple[str, Any]]) -> None:
    """Raise ValueError if one of the entries that are to be saved could not be loaded again.

    Args:
        entries: Names, and what is to be saved under them: no tensors.
    """
    for name, value in entries:
        if not _is_plain(value):
            content = io.BytesIO()
            torch.save(value, content)
            content.seek(0)
            try:
                _load(name, content)
            except RefusedError as error:
                raise ValueError(f"not saved, since it could not be loaded again: {error}") from None


def _load(name: str, content: io.BytesIO) -> Any:
    try:
        return torch.load(content, weights_only=True)
    except pickle.UnpicklingError as error:
        raise RefusedError(f"{name} holds {_what(content, error)}. {_WAY_OUT}") from None


def _what(content: io.BytesIO, error: pickle.UnpicklingError) -> str:
    """What ``weights_only`` does not admit, in words."""
    content.seek(0)
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(content))
    except Exception:  # it is not even what torch.save writes
        names = []
    if names:
        return ", ".join(names)
    paragraphs = str(error).split("\n\n")  # torch puts advice before and after the reason
    return f"what torch refuses: {paragraphs[-2] if len(paragraphs) > 2 else error}"


class _Plain(Exception):
    """Raised where data is not plain."""


class _NotPlain(pickle.Pickler):
    def reducer_override(self, thing: Any) -> Any:
        """Called by C code for all but the plain types, which makes looking at a million numbers cheap."""
        raise _Plain


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)


def _is_plain(value: Any) -> bool:
    if type(value) in (bool, int, float, str, type(None)):
        return True
    try:
        _NotPlain(cast(Any, _Nowhere()), protocol=2).dump(value)
    except _Plain:
        return False
    return True


class _StandIn:
    """What a pickle gets in place of a class: it can make instances, and cannot change the class itself."""

    made: type

    def __new__(cls) -> Any:
        return object.__new__(cls.made)

    def __setstate__(self, state: Any) -> None:
        """Never runs, but is why pickle's BUILD on this class fails: it would set attributes."""


def _stand_in(made: type) -> type:
    return type(made.__name__, (_StandIn,), {"made": made})


class _Properties(TensorProperties):
    """As :class:`_StandIn`, where the memory format is a number: an enum's member could be changed, too."""

    def __setstate__(self, state: Any) -> None:
        dtype, layout, requires_grad, memory_format, pin_memory = state
        encoding = _MEM_FORMAT_ENCODING(memory_format)
        super().__setstate__((dtype, layout, requires_grad, encoding, pin_memory))  # type: ignore[no-untyped-call]
        self.__class__ = TensorProperties  # type: ignore[assignment]


class _MemoryFormat:
    """In place of the enum and of ``getattr``, by which Python 3.11.2 pickles an enum's member."""

    __slots__ = ()

    def __call__(self, *arguments: Any) -> int:
        return _MEMORY_FORMATS[arguments[-1]]


class _Path:
    """In place of all path classes: where the checkpoint was written, which nobody asks for."""

    __slots__ = ()

    def __call__(self, *parts: str) -> PurePath:
        return PurePath(*parts)


_MEMORY_FORMATS: dict[str | int, int] = {
    key: each.value for each in _MEM_FORMAT_ENCODING for key in (each.name, each.value)
}
_METADATA = "torch.distributed.checkpoint.metadata"
_OLDER = "torch.distributed._shard.sharded_tensor.metadata"  # where older versions of torch have them
_LAYOUTS = {str(each): each for each in vars(torch).values() if isinstance(each, torch.layout)}

ADMITTED: dict[tuple[str, str], Any] = {
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
"""What an index may ask for, by module and name, and what it gets."""


class _Unpickler(pickle.Unpickler):
    """Knows what an index consists of, and nothing else; none of it runs code, or can be changed."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(
                f".metadata asks for {module}.{name}, which no index that DCP writes has in it; it was not looked up"
            )
        return ADMITTED[module, name]
