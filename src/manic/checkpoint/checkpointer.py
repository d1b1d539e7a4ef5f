"""Checkpointer: sharded checkpoints of a training run through ``torch.distributed.checkpoint``.

Works with any optimizer and any layout that DCP supports; a checkpoint can be loaded on another number of ranks.
This module orders the operations. run_state.py collects and applies the state, staging.py copies it, transfer.py writes
and reads it, manifest.py lists and checks the files, directory.py names and publishes the folders.
"""

from __future__ import annotations

import logging
import operator
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from manic.checkpoint.directory import Directory
from manic.checkpoint.files import Files
from manic.checkpoint.manifest import MANIFEST, DamagedCheckpointError, Manifest, Verify
from manic.checkpoint.run_state import RunState
from manic.checkpoint.staging import Staging
from manic.checkpoint.transfer import Progress, read, read_index, verify_files, write
from manic.distributed.collectives import on_every_rank, on_first_rank, rank, world_size

__all__ = ["Checkpointer", "DamagedCheckpointError", "on_first_rank"]

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Save:
    """A save in progress: step, folder, state, layout of the parameters and start time (``time.perf_counter``)."""

    step: int
    folder: str
    state: dict[str, Any]
    layout: dict[str, int]
    since: float


class Checkpointer:
    """Saves and loads the whole state of a run: model, optimizers, random states and further objects.

    Each step has one folder, ``step_00000100``, which appears when it is complete and is never overwritten.
    Each rank writes its own shards; nothing is gathered. All methods except :meth:`steps`, :meth:`latest` and
    :meth:`path` must be called on all ranks.

    Args:
        directory: The directory of checkpoints: a local path, or a URL that fsspec supports (``s3://...``, with the
            packages that fsspec needs for it). Created by the first save. With several nodes: a shared directory.
        model: The model, sharded or wrapped by any of PyTorch's wrappers.
        optimizer: Its optimizer, or several.
        objects: Further objects with ``state_dict`` and ``load_state_dict``, for example a scheduler; the same on all
            ranks. Their states hold tensors, plain data and classes registered with
            ``torch.serialization.add_safe_globals``.
        keep_latest: How many of the newest checkpoints to keep; ``None``: all.
        keep_every: Also keep checkpoints whose step is a multiple of this.
        on_error: What a failed save does: ``"raise"`` an ``OSError`` on every rank, or ``"warn"`` through ``logging``
            and continue. Existing checkpoints are not changed.
        progress: Called as bytes are written and verified, on every rank, possibly on another thread, with ``"save"``
            or ``"verify"``, the bytes that this rank has processed, and their approximate total.
        timeout: How long a rank waits for another rank that saves or loads; default: torch's for gloo, 30 minutes.

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
        self._staging: Staging | None = None
        self._own_group: ProcessGroup | None = None

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        return self._directory.steps()

    def latest(self) -> int | None:
        """The newest step that has a checkpoint, or ``None``."""
        return max(self.steps(), default=None)

    def path(self, step: int) -> str:
        """Path or URL of the checkpoint of ``step``, whether or not it exists."""
        return self._directory.path(step)

    def save(self, step: int) -> str | None:
        """Save the state of the run after ``step`` steps, and wait until it is written.

        Args:
            step: Number of steps taken; not negative.

        Returns:
            The checkpoint's folder; ``None`` if the write failed and ``on_error`` is ``"warn"``.

        Raises:
            FileExistsError: on every rank, if that step has a checkpoint.
            OSError: on every rank, if the write fails; or, after a successful write, if an earlier save on another
                thread failed.
            ValueError: if ``step`` is negative; on every rank, if the state of any rank holds an object that
                :meth:`load` would refuse, if a rank lacks sharded state that others have and it cannot be completed,
                or if parameters of one name, or further entries of an optimizer's ``state_dict()``, differ between
                ranks.
        """
        earlier = self._pending.exception() if self._pending is not None else None
        self._pending = None
        saved = self._reporting(step, lambda: self._write(self._begin(step)))
        if earlier is not None:
            raise earlier
        return saved

    def async_save(self, step: int) -> Future[str | None]:
        """Copy the state of the run after ``step`` steps to host memory, and save the copy on another thread.

        On return the state is copied, so the next step may run. The copy takes as much host memory as this rank's
        shards; the memory is reused by the next call. Waits first for a save in progress. Call :meth:`wait` at the end
        of training.

        Args:
            step: Number of steps taken; not negative.

        Returns:
            A future of the value or exception of :meth:`save`. The next call that saves, loads or waits raises that
            exception too; :meth:`save` raises it after saving.

        Raises:
            FileExistsError: on every rank, if that step has a checkpoint.
            OSError: on every rank, if its folder cannot be created.
            ValueError: as :meth:`save`.
        """
        self.wait()
        future: Future[str | None] = Future()

        def begin() -> _Save:
            save = self._begin(step)
            return replace(save, state=on_every_rank(lambda: self._copy(save.state), self._group))

        begun = self._reporting(step, begin)
        if begun is None:
            future.set_result(None)
            return future

        def write() -> None:
            try:
                future.set_result(self._reporting(step, lambda: self._write(begun)))
            except BaseException as error:
                logger.error("saving step %d on another thread failed: %s", step, error)  # the future may never be read
                future.set_exception(error)

        threading.Thread(target=write, name=f"save of step {step}").start()
        self._pending = future
        return future

    def wait(self) -> None:
        """Wait for a save on another thread to finish; raise the exception that it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def load(
        self, step: int | str | os.PathLike[str] = "latest", *, verify: Verify = "full", fallback: bool = False
    ) -> str:
        """Load a checkpoint, saved on any number of ranks, into model, optimizers and objects.

        The whole saved state of every parameter is loaded, frozen or not, or the checkpoint is refused; settings of
        param groups become numbers or tensors as they are in this run. A rank without a saved random state keeps its
        current one.

        Args:
            step: A step, ``"latest"``, or the path or URL of any checkpoint.
            verify: What is checked before loading: ``"full"``, every byte of every file, divided among the ranks;
                ``"size"``, every file's length; ``"off"``, nothing: required for a checkpoint that this class did not
                write.
            fallback: With ``"latest"``: if that checkpoint is incomplete or damaged, warn through ``logging`` and load
                the newest intact one. The next save renames the damaged ones to ``.damaged_step_...``.

        Returns:
            The path of the loaded checkpoint.

        Raises:
            FileNotFoundError: on every rank, if there is no such checkpoint.
            DamagedCheckpointError: on every rank, if the checkpoint is incomplete or damaged; an ``OSError``. If
                ``verify`` detects it, nothing has changed; if reading detects it, do not use the model any more.
            ValueError: on every rank, if the checkpoint is of another model or optimizer, has state of a parameter that
                no param group of this run has, does not hold all elements of a tensor, holds an object of a class
                that is not allowed (see ``torch.serialization.add_safe_globals``), or an object refuses its state;
                nothing else has changed then, except that gradients are cleared.
        """
        self.wait()
        if verify not in ("full", "size", "off"):
            raise ValueError(f'verify must be "full", "size" or "off", got {verify!r}')
        if fallback and step != "latest":
            raise ValueError(f'fallback=True requires step="latest", got {step!r}')
        # Only the first rank lists: on a shared file system, others may not see the newest folder yet.
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
                    logger.warning("%s; falling back to an older checkpoint", error)
            else:
                return path
        raise DamagedCheckpointError(f"no checkpoint in {self.directory} is intact: " + "; ".join(tried))

    @property
    def _group(self) -> ProcessGroup | None:
        """A gloo group of all ranks for this object alone: a save on a thread must not mix with other collectives."""
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
                    logger.warning("renamed the damaged checkpoint to %s", self._directory.set_aside(damaged))
                self._damaged.remove(damaged)
            return self._directory.begin(step)

        state = self._run.collect_to_save(self._group)
        folder = on_first_rank(begin, self._group)
        return _Save(step, folder, state, self._run.layout(), since)

    def _copy(self, state: dict[str, Any]) -> dict[str, Any]:
        self._staging = self._staging or Staging(self._run.is_fsdp1)
        return self._staging.copy(state)

    def _write(self, save: _Save) -> str:
        """Write the files, then the manifest, and publish the checkpoint."""
        files, records = write(save.state, save.folder, self._progress, self._group)

        def publish() -> str:
            path, seconds = self.path(save.step), time.perf_counter() - save.since
            manifest = Manifest.now(save.step, world_size(), save.layout, records, seconds)
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
        """Remove checkpoints beyond the ones to keep; the one just saved is always kept."""
        if self.keep_latest is None:
            return
        every = self.keep_every
        try:  # the save has succeeded; a failure to remove others must not fail it
            steps = self.steps()
            # Later steps are left from before a rollback; they do not count towards keep_latest.
            earlier = [each for each in steps if each < saved]
            newest = [*earlier, saved][-self.keep_latest :]
            keep = {*newest, *steps[len(earlier) :], *(each for each in steps if every and each % every == 0)}
            self._directory.retire(keep)
        except Exception as error:  # the file system behind a URL may raise any type
            logger.warning("could not remove an old checkpoint: %s", error)

    def _reporting(self, step: int, action: Callable[[], T]) -> T | None:
        """Run a part of a save; on failure remove its folder and raise or warn."""
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
        """Paths of the checkpoints to try, in order, with the steps in their names."""
        if step == "latest":
            found = self._directory.find(None)
        elif not isinstance(step, (str, os.PathLike)):
            found = self._directory.find(operator.index(step))
        else:
            files = Files(step)
            if not files.exists(f"{files.root}/.metadata") and not files.exists(f"{files.root}/{MANIFEST}"):
                raise FileNotFoundError(f"{os.fspath(step)} is not a checkpoint: no .metadata and no {MANIFEST}")
            return [(os.fspath(step), None)]
        return [(self.path(each), each) for each in found]

    def _load(self, path: str, number: int | None, verify: Verify) -> None:
        files = Files(path)
        if verify != "off":
            manifest = on_first_rank(lambda: Manifest.read(files), self._group)
            found = verify_files(files, manifest, verify, self._progress, self._group)
            if number is not None and manifest.step != number:
                found.append(f"its {MANIFEST} is of step {manifest.step}")
            if found:
                raise DamagedCheckpointError(f"{path} is damaged: " + "; ".join(found))

        index = on_every_rank(lambda: read_index(files, path), self._group)
        self._run.load(index, lambda state: read(state, files, path, verify, self._group), path, self._group)
