"""Checkpointer: sharded checkpoints of a training run through ``torch.distributed.checkpoint``.

It works with any optimizer, and any layout that DCP knows; what it writes can be loaded on another number of ranks.
What a run's state is, is run_state.py's business, how it is copied, written and read, staging.py's and transfer.py's,
what a checkpoint's files are, manifest.py's, and where they are, directory.py's: here is what happens when.
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
from manic.checkpoint.safe_pickle import check_loadable
from manic.checkpoint.staging import Staging
from manic.checkpoint.transfer import Progress, read, read_index, verify_files, write
from manic.distributed.collectives import on_every_rank, on_first_rank, rank, world_size

__all__ = ["Checkpointer", "DamagedCheckpointError", "on_first_rank"]

T = TypeVar("T")

logger = logging.getLogger(__name__)


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
        self._staging: Staging | None = None
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
            return replace(save, state=on_every_rank(lambda: self._copy(save.state), self._group))

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

    def _copy(self, state: dict[str, Any]) -> dict[str, Any]:
        self._staging = self._staging or Staging(self._run.is_fsdp1)
        return self._staging.copy(state)

    def _write(self, save: _Save) -> str:
        """Write the files, the manifest when they are there, and let the checkpoint appear."""
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
            found = self._directory.find(None)
        elif not isinstance(step, (str, os.PathLike)):
            found = self._directory.find(operator.index(step))
        else:
            files = Files(step)
            if not files.exists(f"{files.root}/.metadata") and not files.exists(f"{files.root}/{MANIFEST}"):
                raise FileNotFoundError(f"{os.fspath(step)} is no checkpoint: it has neither .metadata nor {MANIFEST}")
            return [(os.fspath(step), None)]
        return [(self.path(each), each) for each in found]

    def _load(self, path: str, number: int | None, verify: Verify) -> None:
        files = Files(path)
        if verify != "off":
            manifest = on_first_rank(lambda: Manifest.read(files), self._group)
            found = verify_files(files, manifest, verify, self._progress, self._group)
            if number is not None and manifest.step != number:
                found.append(f"its manifest.json is that of step {manifest.step}")
            if found:
                raise DamagedCheckpointError(f"{path} is damaged: " + "; ".join(found))

        index = on_every_rank(lambda: read_index(files, path), self._group)
        self._run.load(index, lambda state: read(state, files, path, verify, self._group), path, self._group)
