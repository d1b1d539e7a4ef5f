"""Checkpointer: sharded checkpoints of a training run through ``torch.distributed.checkpoint``.

It works with any optimizer, and any layout that DCP knows; what it writes can be loaded on another number of ranks.
What a run's state is, is run_state.py's business, what a checkpoint's files are, manifest.py's, and where they are,
directory.py's: here is what happens when.
"""

from __future__ import annotations

import logging
import operator
import os
import pickle
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed._shard.sharded_tensor import ShardedTensor  # FSDP1's state dicts consist of them
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import AsyncStager, BlockingAsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from manic import __version__
from manic.checkpoint.directory import Directory
from manic.checkpoint.files import FileRecord, Files
from manic.checkpoint.manifest import DamagedCheckpointError, Manifest, Verify
from manic.checkpoint.run_state import RunState
from manic.checkpoint.safe_pickle import RefusedError, SafePlanner, check_loadable
from manic.distributed.collectives import from_every_rank, on_every_rank, on_first_rank, rank, world_size

__all__ = ["Checkpointer", "DamagedCheckpointError", "on_first_rank"]

T = TypeVar("T")

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Told ``"save"`` or ``"verify"``, how many bytes this rank has done, and about how many there are to do."""


@dataclass(frozen=True)
class _Save:
    """A save that has begun: of which step, into which folder, what, spread how, and since when."""

    step: int
    folder: str
    state: dict[str, Any]
    layout: dict[str, int]
    since: float


class Checkpointer:
    """Saves and loads the whole state of a run: model, optimizer, the random state, and what else is given.

    Every step gets a folder of its own, ``step_00000100``, which appears when it is complete and is never written over.
    Each rank writes its own shards; nothing is gathered. All methods but :meth:`steps`, :meth:`latest` and
    :meth:`path` must be called on all ranks.

    Args:
        directory: Where checkpoints live: a local path, or a URL that fsspec knows (``s3://...``, with what fsspec
            needs for it installed). Made when the first one is saved. On several nodes: a shared one.
        model: The model, sharded or wrapped in whatever way.
        optimizer: Its optimizer, or several.
        objects: Whatever else has ``state_dict`` and ``load_state_dict``, the same on all ranks: a scheduler, say.
            Their states consist of tensors, plain data and classes that ``torch.serialization.add_safe_globals`` knows.
        keep_latest: How many checkpoints to keep, the newest ones; ``None``: all.
        keep_every: Keep those whose step is a multiple of this as well.
        on_error: What a save does that cannot write: ``"raise"`` an ``OSError`` on every rank, or ``"warn"`` through
            ``logging`` and let training go on. Checkpoints that there are stay as they are.
        progress: Called as bytes are written and verified, on every rank and maybe on another thread, with ``"save"``
            or ``"verify"``, the bytes that this rank has done, and about how many there are.
        timeout: How long a rank waits for another one that saves or loads; default: torch's for gloo, half an hour.

    Raises:
        ValueError: if ``keep_latest`` or ``keep_every`` is not positive, or ``on_error`` is unknown.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        objects: Mapping[str, Stateful] | None = None,
        keep_latest: int | None = None,
        keep_every: int | None = None,
        on_error: Literal["raise", "warn"] = "raise",
        progress: Progress | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        for name, value in (("keep_latest", keep_latest), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive or None, got {value}")
        if on_error not in ("raise", "warn"):
            raise ValueError(f'on_error must be "raise" or "warn", got {on_error!r}')
        self.directory = os.fspath(directory)
        self.keep_latest = keep_latest
        self.keep_every = keep_every
        self.on_error = on_error
        self._directory = Directory(directory)
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self._run = RunState(model, optimizers, dict(objects or {}))
        self._progress = progress or (lambda what, done, total: None)
        self._timeout = timeout
        self._damaged: list[int] = []
        self._pending: Future[str | None] | None = None
        self._stager: AsyncStager | None = None
        self._own_group: ProcessGroup | None = None

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, ascending."""
        return self._directory.steps()

    def latest(self) -> int | None:
        """The newest step that there is a checkpoint of."""
        return max(self.steps(), default=None)

    def path(self, step: int) -> str:
        """Where the checkpoint of ``step`` is, or would be."""
        return self._directory.path(step)

    def save(self, step: int) -> str | None:
        """Save the state of the run after ``step`` steps, and wait until it is there.

        Args:
            step: How many steps were taken; not negative.

        Returns:
            The checkpoint's folder; ``None`` if it could not be written and ``on_error`` is ``"warn"``.

        Raises:
            FileExistsError: on every rank, if there is a checkpoint of that step.
            OSError: on every rank, if it cannot be written; or, after it was written, if an earlier save on another
                thread could not be.
            ValueError: if ``step`` is negative; on every rank, if some rank's state holds an object that could not be
                loaded again.
        """
        earlier = self._pending.exception() if self._pending is not None else None
        self._pending = None
        saved = self._reporting(step, lambda: self._write(self._begin(step)))
        if earlier is not None:
            raise earlier
        return saved

    def async_save(self, step: int) -> Future[str | None]:
        """Copy the state of the run after ``step`` steps to host memory, and save it from there on another thread.

        When it returns, the state is copied: the next step may be taken. The copy takes as much host memory as this
        rank's shards and is kept for the next time. A save still under way is waited for first. Call :meth:`wait` when
        training is over.

        Args:
            step: How many steps were taken; not negative.

        Returns:
            Of what :meth:`save` returns, or raises. What it raises, the next call of any method that saves, loads or
            waits raises as well; :meth:`save` when it has saved.

        Raises:
            FileExistsError: on every rank, if there is a checkpoint of that step.
            OSError: on every rank, if its folder cannot be made.
            ValueError: as :meth:`save`.
        """
        self.wait()
        future: Future[str | None] = Future()

        def begin() -> _Save:
            save = self._begin(step)
            return replace(save, state=on_every_rank(lambda: self._stage(save.state), self._group))

        begun = self._reporting(step, begin)
        if begun is None:
            future.set_result(None)
            return future

        def write() -> None:
            try:
                future.set_result(self._reporting(step, lambda: self._write(begun)))
            except BaseException as error:
                logger.error("saving step %d on another thread failed: %s", step, error)  # should nobody ask
                future.set_exception(error)

        threading.Thread(target=write, name=f"save of step {step}").start()
        self._pending = future
        return future

    def wait(self) -> None:
        """Wait until a save on another thread is over; raise what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def load(
        self, step: int | str | os.PathLike[str] = "latest", *, verify: Verify = "full", fallback: bool = False
    ) -> str:
        """Load a checkpoint into model, optimizer and objects, whatever number of ranks it was saved on.

        Where it holds no random state of this rank, the present one is kept.

        Args:
            step: Which one: a step, ``"latest"``, or the path or URL of a checkpoint anywhere.
            verify: What is checked before anything is loaded: ``"full"``, every byte of every file, shared out over
                the ranks; ``"size"``, every file's length; ``"off"``, nothing, as needed for a checkpoint that was not
                written by this class.
            fallback: With ``"latest"``: if it is incomplete or damaged, say so through ``logging`` and load the newest
                one that is not. The next save sets the damaged ones aside, under ``.damaged_step_...``.

        Returns:
            The path of the checkpoint that was loaded.

        Raises:
            FileNotFoundError: on every rank, if there is no such checkpoint.
            DamagedCheckpointError: on every rank, if it is incomplete or damaged; an ``OSError``. Found by ``verify``,
                nothing has changed; found while reading, do not go on with the model.
            ValueError: on every rank, if it is of another model or optimizer, holds an object of a class that is not
                admitted (see ``torch.serialization.add_safe_globals``), or one of the objects refuses it; nothing else
                has changed then, but gradients are gone.
        """
        self.wait()
        if verify not in ("full", "size", "off"):
            raise ValueError(f'verify must be "full", "size" or "off", got {verify!r}')
        if fallback and step != "latest":
            raise ValueError('fallback=True goes with "latest"; one checkpoint was asked for')
        # One rank looks: on a shared file system, others may not see the newest folder yet.
        candidates = on_first_rank(lambda: self._candidates(step), self._group)
        tried: list[str] = []
        for path, number in candidates:
            try:
                self._load(path, number, verify)
            except DamagedCheckpointError as error:
                if not fallback:
                    raise
                tried.append(str(error))
                self._damaged += [] if number is None else [number]
                if rank() == 0:
                    logger.warning("%s; going back to an older checkpoint", error)
            else:
                return path
        raise DamagedCheckpointError(f"no checkpoint in {self.directory} is good: " + "; ".join(tried))

    @property
    def _group(self) -> ProcessGroup | None:
        """Of all ranks, on the CPU and for this object alone, so that a save on a thread meets no other collective."""
        if self._own_group is None and dist.is_initialized():
            self._own_group = dist.new_group(backend="gloo", timeout=self._timeout)
        return self._own_group

    def _begin(self, step: int) -> _Save:
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        since = time.perf_counter()

        def begin() -> str:
            for damaged in list(self._damaged):
                if damaged in self.steps():
                    logger.warning("the damaged checkpoint is now %s", self._directory.set_aside(damaged))
                self._damaged.remove(damaged)
            return self._directory.begin(step)

        def collect() -> dict[str, Any]:
            state = self._run.collect()
            check_loadable(self._run.plain_entries(state))
            return state

        state = on_every_rank(collect, self._group)
        folder = on_first_rank(begin, self._group)
        return _Save(step, folder, state, self._run.layout(), since)

    def _stage(self, state: dict[str, Any]) -> dict[str, Any]:
        """A copy in host memory."""
        if self._stager is None and self._run.is_fsdp1:
            self._stager = BlockingAsyncStager()  # the other knows no ShardedTensor
        elif self._stager is None:
            cuda = torch.cuda.is_available()
            options = StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
            )
            self._stager = DefaultStager(options)
        staged: dict[str, Any] = self._stager.stage(state)  # type: ignore[assignment]
        return staged

    def _write(self, save: _Save) -> str:
        """Write the files, the manifest when they are there, and let the checkpoint appear."""
        files = Files(save.folder, self._count("save", _bytes(save.state)))
        try:
            dcp.save(save.state, storage_writer=files.writer(), process_group=self._group)
        except CheckpointException as error:
            raise _os_error(f"could not write {save.folder}", error) from error
        records: dict[str, FileRecord] = {}
        for each in from_every_rank(files.records, self._group):
            records.update(each)

        def publish() -> str:
            path, seconds = self.path(save.step), time.perf_counter() - save.since
            manifest = Manifest(
                step=save.step,
                world_size=world_size(),
                layout=save.layout,
                files=dict(sorted(records.items())),
                manic=__version__,
                torch=torch.__version__,
                time=datetime.now(UTC).isoformat(timespec="seconds"),
                seconds=round(seconds, 3),
            )
            missing = manifest.problems(files, "size", set(records) - {".metadata"})
            if missing:
                raise OSError(f"{save.folder}: {'; '.join(missing)}. Do all ranks see the same directory?")
            manifest.write(files)
            self._directory.publish(save.step)
            logger.info("saved %s: %d bytes in %.2f s", path, manifest.bytes, seconds)
            self._retire(save.step)
            return path

        return on_first_rank(publish, self._group)

    def _retire(self, saved: int) -> None:
        """Remove what is not to be kept; what has just been saved is."""
        if self.keep_latest is None:
            return
        every = self.keep_every
        try:  # the checkpoint is there, whatever becomes of the others
            steps = self.steps()
            # Later ones are of a run that was gone back from: they are no reason to remove those of this one.
            earlier = [each for each in steps if each < saved]
            newest = [*earlier, saved][-self.keep_latest :]
            keep = {*newest, *steps[len(earlier) :], *(each for each in steps if every and each % every == 0)}
            self._directory.retire(keep)
        except Exception as error:  # of whatever kind a URL's file system raises
            logger.warning("could not remove an old checkpoint: %s", error)

    def _reporting(self, step: int, action: Callable[[], T]) -> T | None:
        """Do something for a save; where it fails, tidy up and raise or warn."""
        try:
            return action()
        except (FileExistsError, ValueError):
            raise
        except OSError as error:
            if rank() == 0:
                self._directory.abandon(step)
                if self.on_error == "warn":
                    logger.warning("step %d is not saved: %s", step, error)
            if self.on_error == "raise":
                raise
            return None

    def _candidates(self, step: int | str | os.PathLike[str]) -> list[tuple[str, int | None]]:
        """Paths of checkpoints to load, the first one first, and the steps that their names say."""
        if step == "latest":
            steps = self.steps()
            if not steps:
                raise FileNotFoundError(f"there is no checkpoint in {self.directory}")
            return [(self.path(each), each) for each in reversed(steps)]
        if not isinstance(step, (str, os.PathLike)):
            step = operator.index(step)
            if step not in self.steps():
                raise FileNotFoundError(
                    f"{self.path(step)} is no checkpoint; in {self.directory}, there are steps {self.steps()}"
                )
            if step < self.steps()[-1]:
                logger.warning(
                    "there are later checkpoints than %s, up to step %d: go on in another directory, or they stay the "
                    "latest",
                    self.path(step),
                    self.steps()[-1],
                )
            return [(self.path(step), step)]
        files = Files(step)
        if not files.exists(f"{files.root}/.metadata") and not files.exists(f"{files.root}/manifest.json"):
            raise FileNotFoundError(f"{os.fspath(step)} is no checkpoint: it has neither .metadata nor manifest.json")
        return [(os.fspath(step), None)]

    def _load(self, path: str, number: int | None, verify: Verify) -> None:
        files = Files(path)
        if verify != "off":
            manifest = on_first_rank(lambda: Manifest.read(files), self._group)
            names = sorted(manifest.files, key=lambda name: -manifest.files[name].bytes)[rank() :: world_size()]
            count = self._count("verify", sum(manifest.files[name].bytes for name in names))
            problems = from_every_rank(manifest.problems(files, verify, names, count), self._group)
            found = [problem for each in problems for problem in each]
            if number is not None and manifest.step != number:
                found.append(f"its manifest.json is that of step {manifest.step}")
            if found:
                raise DamagedCheckpointError(f"{path} is damaged: " + "; ".join(found))

        def metadata() -> Any:
            try:
                return files.reader().read_metadata().state_dict_metadata
            except pickle.UnpicklingError as error:
                raise DamagedCheckpointError(f"{path} is damaged: .metadata cannot be read: {error}") from error
            except Exception as error:  # unpickling what is damaged may raise anything
                raise DamagedCheckpointError(f"{path} is damaged: .metadata cannot be read: {error!r}") from error

        def read(state: dict[str, Any]) -> None:
            try:
                dcp.load(state, storage_reader=files.reader(), planner=SafePlanner(), process_group=self._group)
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
                if verify == "full" or any(isinstance(each, out_of_memory) for each in failures):
                    raise _os_error(f"could not read {path}", error) from error
                raise DamagedCheckpointError(f"{path} cannot be read: {_reasons(error)}") from error

        self._run.load(on_every_rank(metadata, self._group), read, path, self._group)

    def _count(self, what: str, total: int) -> Callable[[int], None]:
        done = 0

        def count(size: int) -> None:
            nonlocal done
            done += size
            try:
                self._progress(what, done, max(done, total))
            except Exception:  # nothing of the checkpoint depends on it
                logger.exception("the progress callback failed")

        return count


def _bytes(state: Any) -> int:
    """Of the tensors in a state dict that this rank holds; replicas count on every rank."""
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
    """The same as one that can be caught for what it is: a disk that is full, say, or a mistake."""
    reasons = [reason[0] for reason in error.failures.values()]
    first = next((reason for reason in reasons if isinstance(reason, OSError)), None)
    if first is None:
        return RuntimeError(f"{what}: {_reasons(error)}")
    return OSError(first.errno, f"{what}: {_reasons(error)}")
