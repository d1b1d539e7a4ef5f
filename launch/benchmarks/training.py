"""A training run: what a task and its problem are, and the loop that trains them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt.optimizers import is_norm, make_scheduler

WARM_UP = 0.05
FIXED_SEED = 0
"""For what all runs share: splits, held-out data, and the pretrained weights for fine-tuning."""

Batches = Iterator[tuple[Tensor, Tensor]]
Bases = Callable[[nn.Module, float], list[Optimizer]]


@dataclass(frozen=True)
class Problem:
    """An initial model and its data."""

    model: nn.Module
    batches: Batches
    """Inputs and targets of each step; infinite."""
    held_out: list[tuple[Tensor, Tensor]]
    """Inputs and targets of the final loss; the same for every seed."""
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
    """The mean loss of a model on inputs and targets. ``None``: :func:`loss_of`."""

    def mean_loss(self) -> float:
        """The model's loss on the held-out data, without gradients; infinite where it is not finite."""
        with torch.no_grad():
            parts = [float((self.loss or loss_of)(self.model, *part)) * len(part[1]) for part in self.held_out]
        mean = sum(parts) / sum(len(targets) for _, targets in self.held_out)
        return mean if math.isfinite(mean) else math.inf


@dataclass(frozen=True)
class Task:
    """A training run with all settings except the learning rate and the seed."""

    name: str
    what: str
    """Description for the table."""
    problem: Callable[[int], Problem]
    """Creates the problem of a seed."""
    bases: Bases
    """Creates the base optimizers of a model at a learning rate."""
    base: str
    steps: int
    guess: float
    """Center of the initial grid of learning rates, which is extended until its best is inside."""
    schedule: str = "cosine"
    warm_up: float = WARM_UP
    """Duration of the warm-up as a share of the run."""
    clip: float | None = 1.0
    """Gradient clipping norm."""
    gradient_noise: float = 0.0
    """Standard deviation of noise added to each gradient, as a multiple of the root mean square of its elements."""


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def split_by_decay(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters with weight decay, and norms and biases, which have none."""
    named = list(model.named_parameters())
    return [p for name, p in named if not is_norm(name)], [p for name, p in named if is_norm(name)]


def train(
    task: Task,
    problem: Problem,
    optimizers: Sequence[Any],
    schedule: str | None,
    after_step: Callable[[int], None] = lambda step: None,
) -> float:
    """Train ``problem.model``, and return its held-out loss: infinite if the run diverged.

    Args:
        task: The settings of the run.
        problem: A new problem of the task.
        optimizers: Optimizers of the model's parameters.
        schedule: Schedule of the learning rates after a warm-up; ``None``: constant, without a warm-up.
        after_step: Called with the number of steps after each step.

    Returns:
        Mean loss over the held-out data.
    """
    warm_up = round(task.warm_up * task.steps)
    scheduled = optimizers if schedule is not None else ()
    schedulers = [make_scheduler(optimizer, str(schedule), warm_up, task.steps) for optimizer in scheduled]
    parameters = [parameter for parameter in problem.model.parameters() if parameter.requires_grad]
    noise = torch.Generator().manual_seed(FIXED_SEED)
    loss_function = problem.loss or loss_of
    for step in range(task.steps):
        loss = loss_function(problem.model, *next(problem.batches))
        loss.backward()
        if task.gradient_noise:
            _add_noise(parameters, task.gradient_noise, noise)
        if task.clip is not None:
            nn.utils.clip_grad_norm_(parameters, task.clip)
        if not loss.isfinite():
            return math.inf
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        after_step(step + 1)
    for optimizer in optimizers:
        if hasattr(optimizer, "eval"):  # Schedule-Free evaluates at another point than it trains
            optimizer.eval()
    return problem.mean_loss()


def _add_noise(parameters: Sequence[Tensor], size: float, generator: torch.Generator) -> None:
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            noise = torch.randn(gradient.shape, generator=generator)
            gradient.add_(noise * gradient.square().mean().sqrt(), alpha=size)
