"""What manic costs: the optimizer's step against fused AdamW, as ratios from one run, and checkpoints.

python launch/benchmark.py step --params 25M
python launch/benchmark.py checkpoint --params 25M --ranks 1 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch.optim import AdamW, Optimizer

import checkpoint_cost
from manic import Mechanic

# Width and number of blocks of a GPT with about so many parameters, 256 tokens of vocabulary.
SIZES = {"1M": (128, 5), "25M": (512, 8), "124M": (768, 17), "1B": (2048, 20)}
METHODS: dict[str, Callable[[Optimizer], Optimizer]] = {
    "AdamW": lambda base: base,
    "Mechanic(AdamW)": Mechanic,
    "Mechanic(AdamW), store_delta=False": lambda base: Mechanic(base, store_delta=False),
    'Mechanic(AdamW), variant="pytorch"': lambda base: Mechanic(base, variant="pytorch"),
}


def gpt_shapes(width: int, layers: int) -> list[tuple[int, ...]]:
    """The shapes of launch/model.py's parameters."""
    block: list[tuple[int, ...]] = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)] + [(width,)] * 4
    return [(256, width), *block * layers, (width,), (width,), (256, width)]


def make(method: str, shapes: list[tuple[int, ...]], device: torch.device) -> Optimizer:
    """An optimizer over parameters and gradients of its own."""
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape in shapes:
        parameter = torch.randn(shape, generator=generator).to(device).requires_grad_()
        parameter.grad = 1e-3 * torch.randn(shape, generator=generator).to(device)
        parameters.append(parameter)
    return METHODS[method](AdamW(parameters, lr=1.0, weight_decay=0.1, fused=True))


def time_steps(size: str, repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of a step by method; methods take turns, so that a slow moment of the machine meets all."""
    optimizers = {method: make(method, gpt_shapes(*SIZES[size]), device) for method in METHODS}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for repeat in range(repeats + 3):
        for method, optimizer in optimizers.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 3:  # the first ones create state and warm up
                seconds[method].append(time.perf_counter() - start)
    return {method: statistics.median(times) for method, times in seconds.items()}


def step(options: argparse.Namespace) -> None:
    """The subcommand."""
    device = torch.device(options.device)
    medians = time_steps(options.params, options.repeats, device)
    ratios = {method: median / medians["AdamW"] for method, median in medians.items()}
    if options.json:
        print(json.dumps({"params": options.params, "seconds": medians, "ratios": ratios}))
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    count = sum(torch.Size(shape).numel() for shape in gpt_shapes(*SIZES[options.params]))
    print(f"{count:,} parameters in float32, {name}, torch {torch.__version__}, median of {options.repeats} steps")
    for method, ratio in ratios.items():
        print(f"{method:36}  {1e3 * medians[method]:8.1f} ms  {ratio:5.2f} x fused AdamW")


def checkpoint(options: argparse.Namespace) -> None:
    """The subcommand."""
    sizes = {size: SIZES[size] for size in options.params}
    print(checkpoint_cost.table(sizes, options.ranks, options.directory, options.repeats))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("step", help="time of the optimizer step")
    add.set_defaults(run=step)
    add.add_argument("--params", choices=SIZES, default="25M")
    add.add_argument("--repeats", type=int, default=20)
    add.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add.add_argument("--json", action="store_true")
    add = commands.add_parser("checkpoint", help="size, time and memory of checkpoints, on CPU ranks")
    add.set_defaults(run=checkpoint)
    add.add_argument("--params", choices=SIZES, nargs="+", default=["25M", "124M"])
    add.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    add.add_argument("--repeats", type=int, default=5)
    add.add_argument("--directory", help="where to write (default: the temporary directory)")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
