"""Base optimizers with or without the tuner, and schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from manic import Mechanic, mechanize

BASES = ("adamw", "sgd", "muon")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
# Duration of the decay of wsd as a share of the run.
_WSD_DECAY = 0.2


def make_optimizer(
    model: nn.Module, base: str, lr: float, weight_decay: float, tuner: str, parallel: str, **options: Any
) -> Optimizer | list[Optimizer]:
    """Build the optimizer of a run.

    Args:
        model: The model after :func:`~gpt.parallel.parallelize`.
        base: One of :data:`BASES`.
        lr: Base learning rate, which the tuner scales.
        weight_decay: For matrices; norms have none.
        tuner: ``"mechanic"`` or ``"none"``.
        parallel: The parallel mode of ``model``.
        **options: Options of Mechanic.

    Returns:
        One optimizer, or Muon and AdamW without a tuner.

    Raises:
        ValueError: if ``base`` does not support that mode.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # By name, because an FSDP1 shard of a matrix has one dimension. Embeddings have weight decay too.
    decayed = [p for name, p in trainable if not is_norm(name)]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if is_norm(name)], "weight_decay": 0.0},
    ]
    if base == "muon":
        if parallel in ("fsdp1", "zero1"):
            raise ValueError(
                f"--base-optimizer muon needs whole matrices; --parallel {parallel} splits them by elements"
            )
        bases = muon_and_adamw(trainable, lr, weight_decay)
        return Mechanic(bases, **options) if tuner == "mechanic" else bases

    cls, settings = {
        "adamw": (torch.optim.AdamW, {"lr": lr, "betas": (0.9, 0.95)}),
        "sgd": (torch.optim.SGD, {"lr": lr, "momentum": 0.9}),
    }[base]
    if parallel == "zero1":
        inner = mechanize(cls, plain="sharded", **options) if tuner == "mechanic" else cls
        return ZeroRedundancyOptimizer(groups, optimizer_class=inner, **settings)  # type: ignore[arg-type]
    optimizer = cls(groups, **settings)  # type: ignore[arg-type]
    return Mechanic(optimizer, **options) if tuner == "mechanic" else optimizer


def mechanic_of(optimizer: Optimizer | list[Optimizer]) -> Mechanic | None:
    """The Mechanic in the result of :func:`make_optimizer`, or ``None``."""
    inner = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
    return inner if isinstance(inner, Mechanic) else None


def make_scheduler(optimizer: Optimizer, schedule: str, warmup: int, steps: int) -> LambdaLR:
    """A scheduler with a linear warm-up over ``warmup`` steps, then ``schedule`` until ``steps``."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        if schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        if schedule == "linear":
            return 1.0 - progress
        if schedule == "wsd":
            return min(1.0, (1.0 - progress) / _WSD_DECAY)
        return 1.0

    return LambdaLR(optimizer, factor)


def is_norm(name: str) -> bool:
    """Whether a parameter of that name is a norm or a bias, which have no weight decay."""
    return "norm" in name or name.endswith("bias")


def muon_and_adamw(trainable: list[tuple[str, nn.Parameter]], lr: float, weight_decay: float) -> list[Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest, with updates of equal size, so that one scale fits both."""
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"--base-optimizer muon needs torch 2.9 or newer, this is {torch.__version__}")
    matrices = [p for name, p in trainable if p.ndim == 2 and "blocks." in name]
    rest = [(name, p) for name, p in trainable if not (p.ndim == 2 and "blocks." in name)]
    groups = [
        {"params": [p for name, p in rest if not is_norm(name)], "weight_decay": weight_decay},
        {"params": [p for name, p in rest if is_norm(name)], "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95)),
    ]


class Lion(Optimizer):
    """Lion (Chen et al., 2023, arXiv 2302.06675, Algorithm 2): sign of averaged gradients, decoupled weight decay.

    Args:
        params: Parameters or param groups.
        lr: Size of each element's update.
        betas: Coefficients of the average for the update and of the stored average.
        weight_decay: Decoupled weight decay, multiplied by ``lr``.
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Run a step over the parameters with a gradient."""
        for group in self.param_groups:
            beta_update, beta_average = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["average"] = torch.zeros_like(parameter)
                average = state["average"]
                update = average.lerp(parameter.grad, 1.0 - beta_update).sign_()
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
                average.lerp_(parameter.grad, 1.0 - beta_average)
