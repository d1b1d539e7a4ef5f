"""The base optimizers, with or without the tuner around them."""

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
# The share of a run in which wsd decays.
_WSD_DECAY = 0.2


def make_optimizer(
    model: nn.Module, base: str, lr: float, weight_decay: float, tuner: str, parallel: str, **options: Any
) -> Optimizer | list[Optimizer]:
    """Build the optimizer of a run.

    Args:
        model: Already spread over the ranks.
        base: One of :data:`BASES`.
        lr: Base learning rate, which the tuner scales.
        weight_decay: For matrices; norms have none.
        tuner: ``"mechanic"`` or ``"none"``.
        parallel: The mode that ``model`` is in.
        **options: Of Mechanic.

    Returns:
        One optimizer, or Muon and AdamW where no tuner joins them.

    Raises:
        ValueError: if ``base`` cannot work in that mode.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # Embeddings too: they are matrices, and named alike in every mode (an FSDP1 shard of a matrix has one dimension).
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
        return ZeroRedundancyOptimizer(groups, optimizer_class=inner, **settings)
    optimizer = cls(groups, **settings)
    return Mechanic(optimizer, **options) if tuner == "mechanic" else optimizer


def mechanic_of(optimizer: Optimizer | list[Optimizer]) -> Mechanic | None:
    """The tuner in what :func:`make_optimizer` made, if there is one."""
    inner = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
    return inner if isinstance(inner, Mechanic) else None


def make_scheduler(optimizer: Optimizer, schedule: str, warmup: int, steps: int) -> LambdaLR:
    """A linear warm-up over ``warmup`` steps, then ``schedule`` until ``steps``."""

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
    """Whether a parameter of that name has no weight decay."""
    return "norm" in name or name.endswith("bias")


def muon_and_adamw(trainable: list[tuple[str, nn.Parameter]], lr: float, weight_decay: float) -> list[Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest; updates of equal size, so that one scale fits both."""
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
    """Signs of an average of gradients (Chen et al., 2023, arXiv 2302.06675, Algorithm 2), with decoupled decay.

    Args:
        params: As of any optimizer.
        lr: The size of every element's step.
        betas: Of the average that is taken the sign of, and of the one that is kept.
        weight_decay: Times ``lr``, the share of each parameter that a step takes away.
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take a step along the gradients that there are."""
        for group in self.param_groups:
            shown, kept = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["average"] = torch.zeros_like(parameter)
                average = state["average"]
                update = average.lerp(parameter.grad, 1.0 - shown).sign_()
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
                average.lerp_(parameter.grad, 1.0 - kept)
