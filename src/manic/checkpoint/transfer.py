"""Writing, verifying and reading a state dict through DCP, and the translation of DCP's errors.

Handles DCP, its errors and the participating ranks; does not depend on the run, its steps or the directory.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed import ProcessGroup
from torch.distributed._shard.sharded_tensor import ShardedTensor  # FSDP1's state dicts consist of them
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from manic.checkpoint.files import FileRecord, Files
from manic.checkpoint.manifest import DamagedCheckpointError, Manifest, Verify
from manic.checkpoint.safe_pickle import RefusedError, SafePlanner
from manic.distributed.collectives import from_every_rank, rank, world_size

__all__ = ["Progress", "ProgressCounter", "read", "read_index", "verify_files", "write"]

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with ``"save"`` or ``"verify"``, the bytes that this rank has processed, and their approximate total."""


class ProgressCounter:
    """Counts processed bytes and reports them to a callback; errors of the callback are logged.

    Args:
        progress: The callback.
        what: ``"save"`` or ``"verify"``.
        total: Approximate total, in bytes.
    """

    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self._progress, self._what, self._total = progress, what, total
        self._done = 0

    def __call__(self, size: int) -> None:
        """Count ``size`` more bytes."""
        self._done += size
        try:
            self._progress(self._what, self._done, max(self._done, self._total))
        except Exception:
            logger.exception("the progress callback failed")


def write(
    state: dict[str, Any], folder: str, progress: Progress, group: ProcessGroup | None
) -> tuple[Files, dict[str, FileRecord]]:
    """Write the state; each rank writes one file of its shards.

    Returns:
        The file system that wrote, and the records of all ranks' files by name.

    Raises:
        OSError: on every rank, if any rank could not write.
        RuntimeError: on every rank, if a save fails for another reason.
    """
    files = Files(folder, ProgressCounter(progress, "save", _bytes(state)))
    try:
        with torch.device("cpu"):  # DCP computes offsets of shards on the default device, and reads them
            dcp.save(state, storage_writer=files.writer(), process_group=group)
    except CheckpointException as error:
        raise _os_error(f"could not write {folder}", error) from error
    records: dict[str, FileRecord] = {}
    for each in from_every_rank(files.records, group):
        records.update(each)
    return files, dict(sorted(records.items()))


def verify_files(
    files: Files, manifest: Manifest, verify: Verify, progress: Progress, group: ProcessGroup | None
) -> list[str]:
    """Damage to the files that a manifest lists, in words, the same on every rank; ranks divide the reading."""
    names = sorted(manifest.files, key=lambda name: -manifest.files[name].bytes)[rank() :: world_size()]
    counter = ProgressCounter(progress, "verify", sum(manifest.files[name].bytes for name in names))
    problems = from_every_rank(manifest.problems(files, verify, names, counter), group)
    return [problem for each in problems for problem in each]


def read_index(files: Files, path: str) -> Mapping[str, Any]:
    """DCP's metadata of every key in a checkpoint; messages name the checkpoint ``path``.

    Raises:
        DamagedCheckpointError: if the index cannot be read.
    """
    try:
        index: Mapping[str, Any] = files.reader().read_metadata().state_dict_metadata
    except pickle.UnpicklingError as error:
        raise DamagedCheckpointError(f"{path} is damaged: .metadata cannot be read: {error}") from error
    except Exception as error:  # unpickling damaged data may raise any type
        raise DamagedCheckpointError(f"{path} is damaged: .metadata cannot be read: {error!r}") from error
    return index


def read(state: dict[str, Any], files: Files, path: str, verified: Verify, group: ProcessGroup | None) -> None:
    """Fill ``state`` from a checkpoint; tensors in place.

    Args:
        state: The entries to read, by name.
        files: The checkpoint's files.
        path: The checkpoint's name in messages.
        verified: What was checked before; an error after ``"full"`` is not reported as damage.
        group: A group of all ranks; ``None``: the default group.

    Raises:
        DamagedCheckpointError: on every rank, if a file differs from what was written.
        OSError: on every rank, if a verified file cannot be read.
        RuntimeError: on every rank, if the load fails for another reason, for example lack of memory.
        ValueError: on every rank, if the checkpoint does not fit, or holds a class that is not allowed.
    """
    try:
        with torch.device("cpu"):  # as in a save
            dcp.load(state, storage_reader=files.reader(), planner=SafePlanner(), process_group=group)
    except CheckpointException as error:
        failures = [failure[0] for failure in error.failures.values()]
        if any(isinstance(each, RefusedError) for each in failures):
            raise ValueError(f"{path} is not loaded: {_reasons(error)}") from error
        if any(isinstance(each, pickle.UnpicklingError) for each in failures):
            raise DamagedCheckpointError(f"{path} is damaged: {_reasons(error)}") from error
        misfit = any(word in _reasons(error) for word in ("Missing key", "mismatch"))
        if error.args[0] == "plan" and misfit:
            raise ValueError(f"{path} does not fit this run: {_reasons(error)}") from error
        out_of_memory = (MemoryError, torch.OutOfMemoryError)
        if verified == "full" or any(isinstance(each, out_of_memory) for each in failures):
            raise _os_error(f"could not read {path}", error) from error
        raise DamagedCheckpointError(f"{path} cannot be read: {_reasons(error)}") from error


def _bytes(state: Any) -> int:
    """Bytes of the tensors in a state dict that this rank holds; replicas count on every rank."""
    if isinstance(state, Mapping):
        return sum(_bytes(value) for value in state.values())
    if isinstance(state, DTensor):
        state = state.to_local()
    if isinstance(state, ShardedTensor):
        return sum(_bytes(shard.tensor) for shard in state.local_shards())
    return state.numel() * state.element_size() if type(state) is torch.Tensor else 0


def _reasons(error: CheckpointException) -> str:
    return "; ".join(f"rank {number}: {reason[0]}" for number, reason in error.failures.items())


def _os_error(what: str, error: CheckpointException) -> Exception:
    """The error as an OSError with the first errno, or as a RuntimeError if no rank raised an OSError."""
    reasons = [reason[0] for reason in error.failures.values()]
    first = next((reason for reason in reasons if isinstance(reason, OSError)), None)
    if first is None:
        return RuntimeError(f"{what}: {_reasons(error)}")
    return OSError(first.errno, f"{what}: {_reasons(error)}")
