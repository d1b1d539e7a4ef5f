"""Train a byte-level GPT on any number of ranks, with a learned learning rate.

torchrun --standalone --nproc-per-node 2 launch/train.py

Without --data it trains on the source of Python's standard library. Stop it with Ctrl-C; a restart with the same
--checkpoint-dir, on any number of ranks, resumes the run.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gpt.data import Corpus
from gpt.model import GPT
from gpt.optimizers import BASES, SCHEDULES, make_optimizer, make_scheduler, mechanic_of
from gpt.parallel import MODES, TIMEOUT, Parallel, clip_gradients, parallelize
from gpt.report import Report
from manic.checkpoint import Checkpointer, on_first_rank
from manic.tuners.registry import DEFAULT, SCALES, TUNERS

EVAL_BATCHES = 16


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=600, help="optimizer steps of the whole run")
    add("--batch-size", type=int, default=16, help="sequences per step, over all ranks")
    add("--seq-len", type=int, default=128, help="tokens per sequence")
    add("--layers", type=int, default=4)
    add("--width", type=int, default=128)
    add("--heads", type=int, default=4)
    add("--tied", action="store_true", help="share the embedding's weight with the head")
    add("--lr", type=float, help="base learning rate (default: 1.0 with the tuner, 0.003 without)")
    add("--weight-decay", type=float, default=0.1)
    add("--schedule", choices=SCHEDULES, default="cosine")
    add("--warmup", type=int, help="steps (default: a twentieth of --steps)")
    add("--clip", type=float, default=1.0, help="largest gradient norm; 0: no clipping")
    add("--base-optimizer", choices=BASES, default="adamw")
    add("--tuner", choices=("mechanic", "none"), default="mechanic")
    add("--variant", choices=tuple(TUNERS), default=DEFAULT)
    add("--scale", choices=SCALES, default=SCALES[0], help="one scale for all param groups, or one for each")
    add("--nonfinite", choices=("raise", "skip", "ignore"), default="raise", help="reaction to nonfinite gradients")
    add("--check-every", type=int, default=0, help="steps between checks that ranks have not drifted apart; 0: never")
    add("--parallel", choices=MODES, default="fsdp2")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="dtype of the computation; parameters are fp32")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--data", type=Path, help="file or folder of text, or .u16 file of tokens (default: the standard library)")
    add("--seed", type=int, default=0)
    add("--checkpoint-dir", help="where to save checkpoints, a path or a URL (default: nowhere)")
    add("--checkpoint-every", type=int, default=100, help="steps")
    add("--keep-latest", type=int, default=2, help="number of checkpoints to keep")
    add("--keep-every", type=int, help="also keep checkpoints of multiples of this step (default: none)")
    add("--async-save", action="store_true", help="continue training while a checkpoint is written")
    add("--on-save-error", choices=("raise", "warn"), default="raise", help="stop, or continue without the checkpoint")
    add("--resume", default="auto", help="auto, never, or the path of a checkpoint or a folder of checkpoints")
    add("--verify", choices=("full", "size", "off"), default="full", help="how much of a checkpoint to check")
    add("--metrics", type=Path, help="file of JSON lines; a plot is saved beside it")
    add("--tensorboard", type=Path, help="folder for TensorBoard's events")
    add("--log-every", type=int, default=10, help="steps")
    add("--eval-every", type=int, default=100, help="steps; 0: at the end only")
    options = parser.parse_args(arguments)
    for name in ("steps", "batch_size", "seq_len", "layers", "width", "heads", "checkpoint_every", "log_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(options, name)}")
    if options.lr is None:
        options.lr = 1.0 if options.tuner == "mechanic" else 0.003
    if options.warmup is None:
        options.warmup = options.steps // 20
    return options


class StopSignal:
    """Ctrl-C or SIGTERM on any rank, seen by all ranks at the same step."""

    def __init__(self) -> None:
        self._seen = torch.zeros(1, dtype=torch.int32)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self._seen.fill_(1)  # may arrive twice: from the terminal and from torchrun

    def on_any_rank(self) -> bool:
        """Whether any rank has received the signal; a collective on the CPU, without a host sync."""
        seen = self._seen.clone()
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return bool(seen)


def set_up(choice: str) -> torch.device:
    """Initialise the process group, of one rank without torchrun, and return this rank's device."""
    cuda = torch.cuda.is_available() if choice == "auto" else choice == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    return device


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


def resume(
    checkpointer: Checkpointer | None,
    checkpoints_in: Callable[[str], Checkpointer],
    options: argparse.Namespace,
    progress: Progress,
) -> None:
    """Load the checkpoint that --resume selects."""
    choice = options.resume
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        choice = "auto" if checkpointer and on_first_rank(checkpointer.latest) is not None else choice
    if checkpointer is None:
        if choice not in ("never", "auto"):
            raise ValueError("--resume PATH needs a --checkpoint-dir to save to")
        return
    latest = on_first_rank(checkpointer.latest)
    if choice == "auto":
        if latest is not None:  # if the latest is damaged, load an older one
            checkpointer.load(verify=options.verify, fallback=True)
        return
    if choice != "never":
        elsewhere = checkpoints_in(choice)
        newest = on_first_rank(elsewhere.latest)
        try:
            elsewhere.load(choice if newest is None else newest, verify=options.verify)
        except FileNotFoundError:
            raise FileNotFoundError(f"--resume {choice}: neither a checkpoint nor a folder of checkpoints") from None
    if latest is not None and (choice == "never" or latest > progress.step):
        raise ValueError(
            f"--resume {choice}: {checkpointer.directory} already holds a run, up to step {latest}; choose another "
            "--checkpoint-dir"
        )


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


def train(options: argparse.Namespace, device: torch.device) -> None:
    """Train, resume, evaluate and save as ``options`` say."""
    stop = StopSignal()
    corpus = Corpus(options.data, options.seq_len)
    torch.manual_seed(options.seed)
    model = GPT(corpus.vocabulary, options.seq_len, options.layers, options.width, options.heads, options.tied)
    size = sum(parameter.numel() for parameter in model.parameters())
    parallel = parallelize(model.to(device), options.parallel, device, options.dtype)
    if options.batch_size % parallel.data_size:
        raise ValueError(f"--batch-size {options.batch_size} is not a multiple of {parallel.data_size} ranks")
    optimizer = make_optimizer(
        parallel.model, options.base_optimizer, options.lr, options.weight_decay, options.tuner, options.parallel,
        variant=options.variant, scale=options.scale, nonfinite=options.nonfinite, check_every=options.check_every,
    )  # fmt: skip
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    schedulers = [make_scheduler(each, options.schedule, options.warmup, options.steps) for each in optimizers]
    mechanic = mechanic_of(optimizer)

    part = parallel.part(options.batch_size)
    if options.parallel in ("ddp", "zero1"):
        rebuild_ddp_buckets(parallel, corpus.batch(options.seed, 0, options.batch_size, part).to(device))
    progress = Progress(options)
    report: Report | None = None

    def checkpoints_in(directory: str) -> Checkpointer:
        return Checkpointer(
            directory,
            parallel.model,
            optimizers,
            objects={"progress": progress} | {f"scheduler{i}": each for i, each in enumerate(schedulers)},
            keep_latest=options.keep_latest,
            keep_every=options.keep_every,
            on_error=options.on_save_error,
            progress=lambda *event: report.progress(*event) if report is not None else None,
            timeout=TIMEOUT,
        )

    checkpointer = checkpoints_in(options.checkpoint_dir) if options.checkpoint_dir else None
    resume(checkpointer, checkpoints_in, options, progress)

    if dist.get_rank() == 0:
        report = Report(options.steps, progress.step, options.metrics, options.tensorboard)
        report.message(
            f"{size:,} parameters, {corpus.tokens.numel():,} tokens, {dist.get_world_size()} rank(s), "
            f"--parallel {options.parallel}, {device.type}; unigram entropy {corpus.unigram_entropy():.4f} nats"
        )
        if progress.step:
            report.message(f"resumed at step {progress.step}")
        if progress.step >= options.steps:
            report.message("nothing left to train; pass more --steps, or another --checkpoint-dir for a new run")

    since, since_step, last_loss = time.perf_counter(), progress.step, math.nan
    stopped = False
    saved: str | None = None
    while progress.step < options.steps and not stopped:
        tokens = corpus.batch(options.seed, progress.step, options.batch_size, part).to(device)
        loss = next_token_loss(parallel, tokens)
        loss.backward()
        known: dict[str, Any] = {}
        if options.clip > 0:
            norm = clip_gradients(parallel.model, options.clip)
            known = {"grad_norm": norm} if options.tuner == "mechanic" else {}  # it need not read gradients again
        lr = optimizers[0].param_groups[0]["lr"]
        for each in optimizers:
            each.step(**known)
            each.zero_grad()
        for each in schedulers:
            each.step()
        progress.step += 1
        stopped = stop.on_any_rank()

        last = stopped or progress.step == options.steps
        if report is not None:
            report.advance()
        if progress.step % options.log_every == 0 or last:
            last_loss = mean_over_ranks(loss, parallel)
            metrics = {name: value.item() for name, value in mechanic.metrics().items()} if mechanic else {}
            now = time.perf_counter()
            if report is not None:
                scale = metrics.pop("scale", None if options.scale == "per group" and mechanic else 1.0)
                of_all = {} if scale is None else {"scale": scale, "lr": scale * lr}
                speed = (progress.step - since_step) * options.batch_size * options.seq_len / (now - since)
                record = {"step": progress.step, "loss": last_loss, **of_all, "base_lr": lr}
                report.record({**record, "tokens_per_s": speed, **metrics})
            since, since_step = now, progress.step
        if options.eval_every and progress.step % options.eval_every == 0 and not last:
            eval_loss = evaluate(corpus, parallel, options, device)
            if report is not None:
                report.record({"step": progress.step, "eval_loss": eval_loss})
            since, since_step = time.perf_counter(), progress.step
        if checkpointer is not None and (progress.step % options.checkpoint_every == 0 or last):
            if options.async_save and not last:
                checkpointer.async_save(progress.step)
            else:
                saved = checkpointer.save(progress.step)
            since, since_step = time.perf_counter(), progress.step

    if checkpointer is not None:
        checkpointer.wait()
    if stopped and progress.step < options.steps:
        if report is not None:
            where = f"; saved in {options.checkpoint_dir}" if saved else "; not saved"
            report.message(f"stopped after step {progress.step}{where}")
            report.close()
        return
    eval_loss = evaluate(corpus, parallel, options, device)
    if report is not None:
        report.record({"step": progress.step, "eval_loss": eval_loss})
        trained = "" if math.isnan(last_loss) else f"train loss {last_loss:.4f}, "
        report.message(f"{trained}held-out loss {eval_loss:.4f}")
        report.close()


def main() -> int:
    """Run; report a ValueError or OSError in one line on every rank."""
    options = parse()
    try:
        train(options, set_up(options.device))
        dist.barrier()
    except (ValueError, OSError) as error:
        print(f"rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Instead of sys.exit: a thread of torch may abort the rank at the interpreter's end, and torchrun would then report
    # the finished run as failed.
    os._exit(code)
