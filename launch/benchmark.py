"""Benchmarks of manic: step time, host time, thousands of ranks, checkpoints, GPUs, and one run against a sweep.

python launch/benchmark.py step --params 25M
python launch/benchmark.py host
python launch/benchmark.py latency --params 25M
python launch/benchmark.py train --ranks 1 2
python launch/benchmark.py scale --models 8B 405B
python launch/benchmark.py checkpoint --params 25M --ranks 1 2
python launch/benchmark.py gpu-syncs
python launch/benchmark.py gpu-capture
python launch/benchmark.py tuning --results docs/tuning.jsonl --plot docs/images/tuning.png
python launch/benchmark.py tuning --generated --results docs/tuning-generated.jsonl --profile docs/images/generated.png
python launch/benchmark.py tuning --held-out --results docs/tuning-generated.jsonl --profile docs/images/held-out.png
python launch/benchmark.py tuning --ladder --results docs/tuning-ladder.jsonl --plot docs/images/ladder.png
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import (
    checkpoint,
    gpu,
    gpu_page,
    host,
    ladder,
    ladder_report,
    methods,
    results,
    scale,
    step,
    train,
    tuning,
    tuning_plots,
    tuning_report,
)
from benchmarks.tasks import TASKS

CHOOSING, HELD_OUT = (0, 48), (1000, 1032)
"""Seeds of the generated tasks that a rule is chosen on, and of those that are run once, when it is frozen."""


def run_step(options: argparse.Namespace) -> None:
    """The subcommand."""
    device = torch.device(options.device)
    methods = [step.REFERENCE, *(name for name in options.methods if name != step.REFERENCE)]
    costs = step.measure(methods, options.params, options.repeats, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    count = sum(torch.Size(shape).numel() for shape in step.SIZES[options.params])
    title = f"{count:,} parameters in float32, {name}, torch {torch.__version__}, median of {options.repeats} steps"
    print(title, step.table(costs, device), sep="\n\n")
    if options.json:
        found = {"params": options.params, "device": name, "torch": torch.__version__}
        Path(options.json).write_text(json.dumps({**found, "methods": step.as_json(costs)}, indent=1) + "\n")
    if options.plot:
        step.plot(costs, title, options.plot)


def run_host(options: argparse.Namespace) -> None:
    """The subcommand."""
    methods = [host.REFERENCE, *(name for name in options.methods if name != host.REFERENCE)]
    costs = host.measure(methods, options.layers, options.ranks, options.repeats)
    count = host.count(options.layers)
    print(
        f"{count} DTensors of few elements, rank 0 of {options.ranks}, CPU, {torch.get_num_threads()} thread(s), torch "
        f"{torch.__version__}, {options.repeats} steps: the median of the means of {step.PERIOD} in a row",
        host.table(costs),
        sep="\n\n",
    )
    if options.json:
        found = {"tensors": count, "ranks": options.ranks, "torch": torch.__version__}
        Path(options.json).write_text(json.dumps({**found, "methods": host.as_json(costs)}, indent=1) + "\n")


def run_checkpoint(options: argparse.Namespace) -> None:
    """The subcommand."""
    sizes = {size: checkpoint.SIZES[size] for size in options.params}
    print(checkpoint.table(sizes, options.ranks, options.directory, options.repeats))


def run_latency(options: argparse.Namespace) -> None:
    """The subcommand."""
    for delay in options.delays:
        at_once, late = step.latency_left(options.params, delay, options.repeats)
        print(
            f"all_reduce of {1e3 * delay:.1f} ms: a step takes {1e3 * late:.1f} ms, {1e3 * at_once:.1f} ms without "
            "the delay"
        )


def run_train(options: argparse.Namespace) -> None:
    """The subcommand."""
    for ranks in options.ranks:
        print(f"{ranks} rank(s), torch {torch.__version__}, medians of {options.repeats} runs of each\n")
        extra = options.options.split()
        print(train.table(train.measure(ranks, options.steps, options.repeats, extra)), end="\n\n")


def run_scale(options: argparse.Namespace) -> None:
    """The subcommand."""
    print(
        f"Rank 0's step, float32; hops up and down a tree of nodes of {options.node} ranks, assumed to take "
        f"{1e6 * options.hop:g} us each",
        scale.table(options.models, options.ranks, options.repeats, options.node, options.hop),
        sep="\n\n",
    )


def run_gpu_syncs(options: argparse.Namespace) -> None:
    """The subcommand; it fails if a step syncs other than documented."""
    found = gpu.measure_syncs(torch.device(options.device))
    print(
        "Steps of fused AdamW on one rank. CUDA counts with `torch.cuda.set_sync_debug_mode`, which does not see all "
        "kinds of syncs.",
        gpu.syncs_table(found),
        sep="\n\n",
    )
    if not all(syncs.are_as_documented for syncs in found):
        sys.exit("a step has another number of host syncs than documented")


def run_gpu_capture(options: argparse.Namespace) -> None:
    """The subcommand; it fails if replays differ from eager steps."""
    device = torch.device(options.device)
    found = gpu.measure_replays(device, gpu.graph_of if device.type == "cuda" else None)
    print(
        f'{gpu.CAPTURE_STEPS} steps of fused AdamW, capturable, with nonfinite="ignore"; step {gpu.CAPTURED_AT + 1} is '
        f"captured in a CUDA graph, and replayed from there on. Equal means within {gpu.TOLERANCE['rtol']:g} of a "
        f"number, or {gpu.TOLERANCE['atol']:g}.",
        gpu.replays_table(found),
        sep="\n\n",
    )
    if any(row.are_equal is False for row in found):
        sys.exit("replays of a captured step differ from eager steps")


def run_gpu_page(options: argparse.Namespace) -> None:
    """The subcommand; launch/gpu_report.sh calls it. It fails if a section has failed."""
    sections = gpu_page.read(options.sections)
    options.output.write_text(gpu_page.page(sections, options.command, is_dry_run=options.dry_run))
    print(f"the page is {options.output}")
    if failed := [section.title for section in sections if section.status]:
        sys.exit(f"failed: {'; '.join(failed)}")


def tuning_tasks(options: argparse.Namespace) -> tuple[list[str], tuple[str, ...]]:
    """Names of the tasks, and the methods that they are for."""
    if options.ladder:
        return list(ladder.TASKS), methods.LADDER_METHODS
    seeds = HELD_OUT if options.held_out else CHOOSING if options.generated else options.generated_seeds
    if seeds is not None:
        return [f"g{seed}" for seed in range(*seeds)], methods.GENERATED_METHODS
    return options.tasks or list(TASKS), methods.NAMED_METHODS


def run_tuning(options: argparse.Namespace) -> None:
    """The subcommand."""
    seeds = range(options.seeds)
    tasks, chosen = tuning_tasks(options)
    chosen = options.methods or chosen
    base_lrs = options.base_lrs or ((1.0,) if options.ladder else methods.BASE_LRS)
    if options.no_runs:
        known = results.read(options.results)
    else:
        known = tuning.measure(options.results, tasks, chosen, seeds, options.processes, base_lrs)
    found = tuning_report.rows(known, tasks, chosen, seeds)
    own = [result.seconds for run, result in known.items() if run.task in tasks]
    print(
        f"{len(found)} of {len(tasks)} tasks, {len(own)} runs, {sum(own) / 60:.0f} minutes of one core; "
        f"{options.seeds} seeds; {tuning_report.versions()}"
    )
    if not found:
        return
    print(tuning_report.table(found, chosen), tuning_report.summary_table(found, chosen), sep="\n\n")
    if options.ladder:
        print("", ladder_report.table(known, found, seeds), sep="\n")
    if options.plot:
        (ladder_report if options.ladder else tuning_plots).plot(known, found, seeds, options.plot)
    if options.profile:
        tuning_plots.profile(found, chosen, options.profile)
    if options.sweeps:
        tuning_plots.sweeps(known, found, seeds, options.sweeps)


def step_options(parser: argparse.ArgumentParser) -> None:
    """Of step."""
    add = parser.add_argument
    add("--params", choices=step.SIZES, default="25M")
    add("--methods", nargs="+", choices=step.METHODS, default=list(step.METHODS))
    add("--repeats", type=int, default=20)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", metavar="FILE", help="write the results to this file")
    add("--plot", metavar="FILE", help="plot the ratios to this file")


def host_options(parser: argparse.ArgumentParser) -> None:
    """Of host."""
    add = parser.add_argument
    add("--methods", nargs="+", choices=host.METHODS, default=list(host.METHODS))
    add("--layers", type=int, default=32, help="blocks of a Llama-like model, nine tensors each")
    add("--ranks", type=int, default=64, help="number of ranks that the tensors are sharded over")
    add("--repeats", type=int, default=30)
    add("--json", metavar="FILE", help="write the results to this file")


def latency_options(parser: argparse.ArgumentParser) -> None:
    """Of latency."""
    add = parser.add_argument
    add("--params", choices=step.SIZES, default="25M")
    add("--delays", type=float, nargs="+", default=[0.002, 0.005, 0.1], help="seconds")
    add("--repeats", type=int, default=20)


def train_options(parser: argparse.ArgumentParser) -> None:
    """Of train."""
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[1, 2])
    add("--steps", type=int, default=100)
    add("--repeats", type=int, default=3)
    add("--options", default="", help="options of launch/train.py, in one string")


def scale_options(parser: argparse.ArgumentParser) -> None:
    """Of scale."""
    add = parser.add_argument
    add("--models", choices=scale.MODELS, nargs="+", default=list(scale.MODELS))
    add("--ranks", type=int, nargs="+", default=[64, 1024, 16384])
    add("--repeats", type=int, default=5)
    add("--node", type=int, default=8, help="ranks per node, for the model of the all_reduce's latency")
    add("--hop", type=float, default=10e-6, help="seconds per message between nodes, for that model")


def checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Of checkpoint."""
    add = parser.add_argument
    add("--params", choices=checkpoint.SIZES, nargs="+", default=["25M", "124M"])
    add("--ranks", type=int, nargs="+", default=[1, 2])
    add("--repeats", type=int, default=5)
    add("--directory", help="where to write (default: the temporary directory)")


def gpu_page_options(parser: argparse.ArgumentParser) -> None:
    """Of gpu-page."""
    add = parser.add_argument
    add("--sections", type=Path, required=True, metavar="FOLDER", help="what the script left")
    add("--output", type=Path, required=True, metavar="FILE")
    add("--command", required=True, help="what the page says that it was written by")
    add("--dry-run", action="store_true", help="say that no GPU was used")


def tuning_options(parser: argparse.ArgumentParser) -> None:
    """Of tuning."""
    add = parser.add_argument
    of = parser.add_mutually_exclusive_group()
    of.add_argument("--tasks", choices=TASKS, nargs="+", help="named tasks (default: all of them)")
    of.add_argument("--generated", action="store_true", help="the generated tasks of seeds 0 to 47, to choose a rule")
    of.add_argument("--generated-seeds", type=int, nargs=2, metavar=("FIRST", "END"), help="other generated tasks")
    of.add_argument("--held-out", action="store_true", help="those of seeds 1000 to 1031, for when the rule is frozen")
    of.add_argument("--ladder", action="store_true", help="two models and three schedules, 300 to 30,000 steps")
    add("--methods", choices=methods.NAMED_METHODS, nargs="+", help="default: all that suit the tasks")
    add("--seeds", type=int, default=3, help="seeds of the first weights and the order of the data")
    add("--base-lrs", type=float, nargs="+", help="the tuner's (default: 1e-6 to 100; of the ladder 1)")
    add("--processes", type=int, default=os.cpu_count(), help="concurrent runs, each on one thread")
    add("--results", type=Path, required=True, metavar="FILE", help="read; missing runs are appended")
    add("--no-runs", action="store_true", help="only report what the file has")
    add("--plot", type=Path, metavar="FILE", help="plot losses and scales, by task or horizon")
    add("--profile", type=Path, metavar="FILE", help="plot how often each method comes how near")
    add("--sweeps", type=Path, metavar="FILE", help="plot the tuner's run and the sweep on six tasks, by rank")


def device_option(parser: argparse.ArgumentParser) -> None:
    """Of gpu-syncs and gpu-capture."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


COMMANDS: list[tuple[str, Callable[[argparse.Namespace], None], Callable[[argparse.ArgumentParser], None], str]] = [
    ("step", run_step, step_options, "time and memory of the optimizer step"),
    ("host", run_host, host_options, "host time of a step over many small DTensors, on simulated ranks"),
    ("latency", run_latency, latency_options, "the part of an all_reduce's latency that a step waits for, on a CPU"),
    ("train", run_train, train_options, "tokens/s of launch/train.py with and without the tuner"),
    ("scale", run_scale, scale_options, "cost of a step on thousands of simulated ranks"),
    ("checkpoint", run_checkpoint, checkpoint_options, "size, time and memory of checkpoints, on CPU ranks"),
    ("gpu-syncs", run_gpu_syncs, device_option, "host syncs of a step on a GPU, against those documented"),
    ("gpu-capture", run_gpu_capture, device_option, "replays of a step in a CUDA graph, against eager steps"),
    ("gpu-page", run_gpu_page, gpu_page_options, "the page of launch/gpu_report.sh, which calls this"),
    ("tuning", run_tuning, tuning_options, "one run against the best of a sweep, over tasks, methods and seeds"),
]
"""Name, function, its options and what it is for."""


def main() -> None:
    """Run a subcommand and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for name, run, add_options, about in COMMANDS:
        command = commands.add_parser(name, help=about)
        command.set_defaults(run=run)
        add_options(command)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
