"""What a step must show on a CUDA device: how often the host waits, and that replays of a captured step equal it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import AdamW

from benchmarks.step import Shapes, make_parameters
from manic import Mechanic

NEEDS_GPU = "needs a GPU"
VARIANTS = ("multiplicative", "optax")
MODES: dict[Literal["raise", "skip", "ignore"], int] = {"raise": 1, "skip": 1, "ignore": 0}
"""By ``nonfinite``: how many host syncs a step may have, once the first scale is known."""
FIRST_STEPS, LATER_STEPS = 4, 8
"""In the first steps the tuner finds its first scale; in the later ones the syncs must be as many as documented."""
CAPTURED_AT, CAPTURE_STEPS = 4, 12
"""A step is captured when so many have been taken, and replayed for the rest."""
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
"""How far replays may be from eager steps."""
# One matrix of which the default tuner sums over a sample, and small parameters.
SHAPES: Shapes = [(1024, 512), (64, 64), (64,), (7, 3)]

Step = Callable[[], Any]


@dataclass(frozen=True)
class Syncs:
    """Host syncs of one way to step; ``None`` where the device has none to count."""

    what: str
    first: list[int | None]
    """Of each of the first steps."""
    later: list[int | None]
    """Of each step after them."""
    expected: range
    """How many a later step may have."""

    @property
    def are_as_documented(self) -> bool:
        """Whether every later step has an expected number; True where none was counted."""
        return all(count is None or count in self.expected for count in self.later)


@dataclass(frozen=True)
class Replays:
    """How replays of a captured step compare with eager steps; ``None`` where the device cannot capture."""

    variant: str
    eager_scale: float
    replayed_scale: float | None = None
    difference: float | None = None
    """The largest difference between two elements of the parameters."""
    are_equal: bool | None = None
    """Whether parameters and scale differ by no more than :data:`TOLERANCE`."""


def count_syncs(step: Step) -> int:
    """Take a step, and count the host syncs of which CUDA warns."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in seen)


def _uncounted(step: Step) -> None:
    step()


def measure_syncs(device: torch.device) -> list[Syncs]:
    """Count the host syncs of every mode; the first is a read of a tensor, which must count as one."""
    count: Callable[[Step], int | None] = count_syncs if device.type == "cuda" else _uncounted
    one = torch.ones((), device=device)
    found = [Syncs("a read of one number, as a control", [], [count(one.item)], range(1, 2))]
    for variant in VARIANTS:
        for mode, most in MODES.items():
            parameters = make_parameters(SHAPES, device)
            base = AdamW(parameters, lr=1.0, weight_decay=0.1, fused=True)
            optimizer = Mechanic(base, variant=variant, nonfinite=mode)
            counts = []
            for _ in range(FIRST_STEPS + LATER_STEPS):
                for parameter in parameters:  # with a constant gradient, a learned rate grows without bound
                    assert parameter.grad is not None
                    parameter.grad.neg_()
                counts.append(count(optimizer.step))
            what = f'variant="{variant}", nonfinite="{mode}"'
            found.append(Syncs(what, counts[:FIRST_STEPS], counts[FIRST_STEPS:], range(most + 1)))
    return found


def syncs_table(found: Sequence[Syncs]) -> str:
    """A Markdown table of the host syncs."""
    heads = ["", f"first {FIRST_STEPS} steps", "each later step", "documented", ""]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for syncs in found:
        later = _least_to_most(syncs.later)
        documented = _least_to_most([syncs.expected[0], syncs.expected[-1]])
        verdict = "" if None in syncs.later else "as documented" if syncs.are_as_documented else "**not as documented**"
        first = NEEDS_GPU if None in syncs.first else ", ".join(map(str, syncs.first))
        lines.append(f"| {syncs.what} | {first} | {later} | {documented} | {verdict} |")
    return "\n".join(lines)


def _least_to_most(counts: Sequence[int | None]) -> str:
    known = [count for count in counts if count is not None]
    if not known:
        return NEEDS_GPU
    least, most = min(known), max(known)
    return str(most) if least == most else f"{least} to {most}"


def graph_of(step: Step) -> Step:
    """Capture a step in a CUDA graph, and return what replays it."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def take_steps(
    parameters: Sequence[Tensor], capture: Callable[[Step], Step] | None, *, fused: bool | None = None, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """Take steps of Mechanic(AdamW) with gradients and a learning rate that change from step to step.

    Args:
        parameters: They are changed.
        capture: Turns ``optimizer.step`` into a call that repeats it, after :data:`CAPTURED_AT` steps. ``None``: all
            steps are eager.
        fused: Whether AdamW is fused. ``None``: as torch chooses.
        options: Mechanic's.

    Returns:
        The scale and the parameters after the last step.
    """
    device = parameters[0].device
    lr = torch.tensor(1.0, device=device)
    base = AdamW(parameters, lr=lr, weight_decay=0.1, capturable=device.type == "cuda", fused=fused)
    optimizer = Mechanic(base, s_init=1e-3, nonfinite="ignore", **options)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    take_step: Step = optimizer.step
    for step in range(CAPTURE_STEPS):
        if capture is not None and step == CAPTURED_AT:  # the state exists, and lazy compilation is done
            take_step = capture(optimizer.step)
        lr.fill_(1.0 - 0.05 * step)
        for index, parameter in enumerate(parameters):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + index))
            assert parameter.grad is not None
            parameter.grad.copy_(parameter.detach() + 0.1 * noise.to(device))
        take_step()
    return optimizer.scale.clone(), [parameter.detach().clone() for parameter in parameters]


def measure_replays(device: torch.device, capture: Callable[[Step], Step] | None) -> list[Replays]:
    """Compare replays with eager steps, for fused AdamW; without ``capture`` take the eager steps alone."""
    found = []
    for variant in VARIANTS:
        scale, eager = take_steps(make_parameters(SHAPES, device), None, fused=True, variant=variant)
        if capture is None:
            found.append(Replays(variant, scale.item()))
            continue
        again, replayed = take_steps(make_parameters(SHAPES, device), capture, fused=True, variant=variant)
        pairs = [(again, scale), *zip(replayed, eager)]
        difference = max((ours - theirs).abs().max().item() for ours, theirs in pairs[1:])
        are_equal = all(_is_close(ours, theirs) for ours, theirs in pairs)
        found.append(Replays(variant, scale.item(), again.item(), difference, are_equal))
    return found


def _is_close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=TOLERANCE["rtol"], atol=TOLERANCE["atol"])


def replays_table(found: Sequence[Replays]) -> str:
    """A Markdown table of the comparison."""
    heads = ["", "S of eager steps", "S of replays", "largest difference of the parameters", ""]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in found:
        cells = [f'variant="{row.variant}"', f"{row.eager_scale:.6g}", NEEDS_GPU, NEEDS_GPU, ""]
        if row.are_equal is not None:
            cells[2:] = f"{row.replayed_scale:.6g}", f"{row.difference:.1e}", "equal" if row.are_equal else "**differ**"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
