"""Train a byte-level GPT on any number of ranks, with a learned learning rate.

torchrun --standalone --nproc-per-node 2 launch/train.py

Without --data it trains on the source of Python's standard library. Stop it with Ctrl-C; a restart with the same
--checkpoint-dir, on any number of ranks, resumes the run.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpt.job import Job
from gpt.optimizers import BASES, SCHEDULES
from gpt.parallel import MODES, TIMEOUT
from manic.tuners.registry import DEFAULT, SCALES, TUNERS


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


def train(options: argparse.Namespace, device: torch.device) -> None:
    """Train, resume, evaluate and save as ``options`` say."""
    stop = StopSignal()
    job = Job(options, device)
    job.resume()
    job.open_report()
    stopped = False
    while job.steps_taken < options.steps and not stopped:
        loss = job.step()
        stopped = stop.on_any_rank()
        is_last = stopped or job.steps_taken == options.steps
        if job.steps_taken % options.log_every == 0 or is_last:
            job.log(loss)
        job.step_schedules()
        if options.eval_every and job.steps_taken % options.eval_every == 0 and not is_last:
            job.evaluate()
        if job.steps_taken % options.checkpoint_every == 0 or is_last:
            job.save(is_last=is_last)
    job.finish(was_stopped=stopped)


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
