"""One training run: the model and its data, a step, what is reported, and what is saved and resumed."""

from __future__ import annotations

import argparse
import math
import os
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gpt.data import Corpus
from gpt.model import GPT
from gpt.optimizers import make_optimizer, make_scheduler, mechanic_of
from gpt.parallel import TIMEOUT, Parallel, clip_gradients, parallelize
from gpt.report import Report
from manic.checkpoint import Checkpointer, on_first_rank

EVAL_BATCHES = 16


def next_token_loss(parallel: Parallel, tokens: Tensor) -> Tensor:
    """Mean nats per token of sequences [n, time + 1]."""
    with parallel.autocast:
        logits = parallel.model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def rebuild_ddp_buckets(parallel: Parallel, tokens: Tensor) -> None:
    """Let DDP rebuild its buckets in the order in which gradients arrive, as it does after the first backward.

    Otherwise the first step after a resume would sum in another order than the same step of an uninterrupted run.
    """
    next_token_loss(parallel, tokens).backward()
    parallel.model.zero_grad()


def mean_over_ranks(loss: Tensor, parallel: Parallel) -> float:
    """The mean of the ranks' losses."""
    total = loss.detach().clone()
    if parallel.data_size > 1:
        dist.all_reduce(total)
        total /= parallel.data_size
    return total.item()


@torch.no_grad()
def evaluate(corpus: Corpus, parallel: Parallel, options: argparse.Namespace, device: torch.device) -> float:
    """Mean nats per token over fixed batches of held-out text."""
    parallel.model.eval()
    part = parallel.part(options.batch_size)
    losses = [
        next_token_loss(parallel, corpus.batch(0, index, options.batch_size, part, held_out=True).to(device))
        for index in range(EVAL_BATCHES)
    ]
    parallel.model.train()
    return mean_over_ranks(torch.stack(losses).mean(), parallel)


class Progress:
    """The number of steps taken, which with the seed determines the next batch."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.step = 0
        # A checkpoint with other values of these is of another run.
        names = "seed batch_size seq_len heads base_optimizer tuner variant lr weight_decay schedule clip"
        self.identity = {name: getattr(options, name) for name in names.split()}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, **self.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in self.identity.items():
            if state[name] != value:
                flag = name.replace("_", "-")
                raise ValueError(
                    f"the checkpoint has --{flag} {state[name]}, this run has --{flag} {value}; pass the same, or "
                    "start a new run in another --checkpoint-dir"
                )
        self.step = state["step"]


class Job:
    """A run of the main job; every rank has one, and calls the same methods in the same order.

    Args:
        options: The command line.
        device: This rank's.

    Raises:
        ValueError: if the options do not go together.
    """

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self._options, self._device = options, device
        self._corpus = Corpus(options.data, options.seq_len)
        torch.manual_seed(options.seed)
        model = GPT(
            self._corpus.vocabulary, options.seq_len, options.layers, options.width, options.heads, options.tied
        )
        self._size = sum(parameter.numel() for parameter in model.parameters())
        self._parallel = parallelize(model.to(device), options.parallel, device, options.dtype)
        if options.batch_size % self._parallel.data_size:
            raise ValueError(f"--batch-size {options.batch_size} is not a multiple of {self._parallel.data_size} ranks")
        optimizer = make_optimizer(
            self._parallel.model, options.base_optimizer, options.lr, options.weight_decay, options.tuner,
            options.parallel, variant=options.variant, scale=options.scale, nonfinite=options.nonfinite,
            check_every=options.check_every,
        )  # fmt: skip
        self._optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
        self._schedulers = [
            make_scheduler(each, options.schedule, options.warmup, options.steps) for each in self._optimizers
        ]
        self._mechanic = mechanic_of(optimizer)
        self._part = self._parallel.part(options.batch_size)
        if options.parallel in ("ddp", "zero1"):
            rebuild_ddp_buckets(self._parallel, self._batch(0))
        self._progress = Progress(options)
        self._report: Report | None = None
        self._checkpointer = self._checkpoints_in(options.checkpoint_dir) if options.checkpoint_dir else None
        self._saved: str | None = None
        self._last_loss = math.nan
        self._restart_clock()

    @property
    def steps_taken(self) -> int:
        """Steps of the whole run so far, those before a resume included."""
        return self._progress.step

    def _batch(self, step: int) -> Tensor:
        batch = self._corpus.batch(self._options.seed, step, self._options.batch_size, self._part)
        return batch.to(self._device)

    def _restart_clock(self) -> None:
        """Leave what comes before out of the tokens per second."""
        self._since, self._since_step = time.perf_counter(), self._progress.step

    def _checkpoints_in(self, directory: str) -> Checkpointer:
        return Checkpointer(
            directory,
            self._parallel.model,
            self._optimizers,
            objects={"progress": self._progress}
            | {f"scheduler{i}": scheduler for i, scheduler in enumerate(self._schedulers)},
            keep_latest=self._options.keep_latest,
            keep_every=self._options.keep_every,
            on_error=self._options.on_save_error,
            progress=lambda *event: self._report.progress(*event) if self._report is not None else None,
            timeout=TIMEOUT,
        )

    def resume(self) -> None:
        """Load the checkpoint that --resume selects."""
        choice, checkpointer = self._options.resume, self._checkpointer
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            choice = "auto" if checkpointer and on_first_rank(checkpointer.latest) is not None else choice
        if checkpointer is None:
            if choice not in ("never", "auto"):
                raise ValueError("--resume PATH needs a --checkpoint-dir to save to")
            return
        latest = on_first_rank(checkpointer.latest)
        if choice == "auto":
            if latest is not None:  # if the latest is damaged, load an older one
                checkpointer.load(verify=self._options.verify, fallback=True)
            return
        if choice != "never":
            self._load_from(choice)
        if latest is not None and (choice == "never" or latest > self._progress.step):
            raise ValueError(
                f"--resume {choice}: {checkpointer.directory} already holds a run, up to step {latest}; choose another "
                "--checkpoint-dir"
            )

    def _load_from(self, path: str) -> None:
        elsewhere = self._checkpoints_in(path)
        newest = on_first_rank(elsewhere.latest)
        try:
            elsewhere.load(path if newest is None else newest, verify=self._options.verify)
        except FileNotFoundError:
            raise FileNotFoundError(f"--resume {path}: neither a checkpoint nor a folder of checkpoints") from None

    def open_report(self) -> None:
        """Begin to report, on rank 0; after :meth:`resume`."""
        self._restart_clock()
        if dist.get_rank() != 0:
            return
        options, step = self._options, self._progress.step
        self._report = Report(options.steps, step, options.metrics, options.tensorboard)
        self._report.message(
            f"{self._size:,} parameters, {self._corpus.tokens.numel():,} tokens, {dist.get_world_size()} rank(s), "
            f"--parallel {options.parallel}, {self._device.type}; unigram entropy "
            f"{self._corpus.unigram_entropy():.4f} nats"
        )
        if step:
            self._report.message(f"resumed at step {step}")
        if step >= options.steps:
            self._report.message("nothing left to train; pass more --steps, or another --checkpoint-dir for a new run")

    def step(self) -> Tensor:
        """Take a step; return this rank's loss."""
        loss = next_token_loss(self._parallel, self._batch(self._progress.step))
        loss.backward()
        known: dict[str, Any] = {}
        if self._options.clip > 0:
            norm = clip_gradients(self._parallel.model, self._options.clip)
            known = {"grad_norm": norm} if self._options.tuner == "mechanic" else {}  # need not read gradients again
        for optimizer in self._optimizers:
            optimizer.step(**known)
            optimizer.zero_grad()
        self._progress.step += 1
        if self._report is not None:
            self._report.advance()
        return loss

    def step_schedules(self) -> None:
        """Set the learning rates of the next step."""
        for scheduler in self._schedulers:
            scheduler.step()

    def log(self, loss: Tensor) -> None:
        """Report the loss, the tuner and the speed since the last call; before :meth:`step_schedules`."""
        step, options = self._progress.step, self._options
        lr = self._optimizers[0].param_groups[0]["lr"]
        self._last_loss = mean_over_ranks(loss, self._parallel)
        metrics = self._mechanic.metrics(to_host=True) if self._mechanic else {}
        if self._report is not None:
            scale = metrics.pop("scale", None if options.scale == "per group" and self._mechanic else 1.0)
            of_all = {} if scale is None else {"scale": scale, "lr": scale * lr}
            tokens = (step - self._since_step) * options.batch_size * options.seq_len
            speed = tokens / (time.perf_counter() - self._since)
            record = {"step": step, "loss": self._last_loss, **of_all, "base_lr": lr}
            self._report.record({**record, "tokens_per_s": speed, **metrics})
        self._restart_clock()

    def evaluate(self) -> float:
        """Report and return the held-out loss."""
        loss = evaluate(self._corpus, self._parallel, self._options, self._device)
        if self._report is not None:
            self._report.record({"step": self._progress.step, "eval_loss": loss})
        self._restart_clock()
        return loss

    def save(self, *, is_last: bool) -> None:
        """Save a checkpoint, if there is a folder for it; the last one is waited for."""
        if self._checkpointer is None:
            return
        if self._options.async_save and not is_last:
            self._checkpointer.async_save(self._progress.step)
        else:
            self._saved = self._checkpointer.save(self._progress.step)
        self._restart_clock()

    def finish(self, *, was_stopped: bool) -> None:
        """Wait for the checkpoint that is being written; report the held-out loss, or that the run was stopped."""
        if self._checkpointer is not None:
            self._checkpointer.wait()
        if was_stopped and self._progress.step < self._options.steps:
            where = f"; saved in {self._options.checkpoint_dir}" if self._saved else "; not saved"
            message = f"stopped after step {self._progress.step}{where}"
        else:
            held_out = self.evaluate()
            trained = "" if math.isnan(self._last_loss) else f"train loss {self._last_loss:.4f}, "
            message = f"{trained}held-out loss {held_out:.4f}"
        if self._report is not None:
            self._report.message(message)
            self._report.close()
