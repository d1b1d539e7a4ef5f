"""Tasks that are generated: a task is a seed, which draws model, data, base optimizer, schedule and horizon."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from random import Random

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks import problems, sequences
from benchmarks.data import Make
from benchmarks.training import Bases, Task, split_by_decay
from gpt.optimizers import Lion

KINDS: dict[str, tuple[Callable[[Random], tuple[Make, str]], float]] = {
    "mlp": (problems.mlp, 0.5), "cnn": (problems.cnn, 1.0), "vit": (problems.vit, 2.0),
    "autoencoder": (problems.autoencoder, 0.5), "denoiser": (problems.denoiser, 0.8),
    "factorisation": (problems.factorisation, 0.3), "linear": (problems.linear_regression, 0.2),
    "logistic": (problems.logistic_regression, 0.2), "pinn": (problems.pinn, 1.0),
    "experts": (problems.experts, 0.7), "graph": (problems.graph, 1.0), "gpt": (sequences.gpt, 3.0),
    "lstm": (sequences.lstm, 3.0), "fine-tuning": (sequences.fine_tuning, 3.0), "lora": (sequences.lora, 4.0),
    "recall": (sequences.recall, 2.0),
}  # fmt: skip
"""By name: what draws a problem and describes it, and the milliseconds that a step may be expected to take."""
_BUDGET = 6.0  # seconds that a run may be expected to take
_SHORT, _LONG, _LONGEST = 300, 3_000, 30_000

# By base optimizer: how many of a block of seeds have it, and the center of the first grid of learning rates.
_BASES = {
    "adamw": (5, 4e-3), "adam": (2, 4e-3), "sgd": (2, 0.25), "momentum": (3, 0.06), "lion": (2, 1e-3),
    "muon": (2, 8e-3), "rmsprop": (1, 2e-3), "adagrad": (1, 3e-2), "nadam": (1, 4e-3), "adafactor": (1, 3e-2),
}  # fmt: skip
# Kinds that have no hidden matrices for Muon.
_FLAT = ("linear", "logistic", "factorisation", "experts", "cnn")


def _deal(cards: list[str], seed: int, salt: str) -> str:
    """The card of a seed, where each block of ``len(cards)`` seeds is dealt all cards in an order of its own."""
    block, place = divmod(seed, len(cards))
    return Random(f"{salt}/{block}").sample(cards, len(cards))[place]


@cache
def generated(seed: int) -> Task:
    """The task of a seed, named ``g`` and the seed."""
    draw = Random(f"task/{seed}")
    kind = _deal(list(KINDS), seed, "kind")
    base = _deal([name for name, (count, _) in _BASES.items() for _ in range(count)], seed, "base")
    base = "adamw" if base == "muon" and kind in _FLAT else base
    make, cost = KINDS[kind]
    problem, what = make(draw)
    longest = min(_LONG, int(1000 * _BUDGET / cost))
    if cost <= 0.3 and draw.random() < 0.2:
        steps = _LONGEST
    else:
        steps = round(math.exp(draw.uniform(math.log(_SHORT), math.log(longest))))
    schedule = draw.choices(("constant", "cosine", "linear", "wsd"), (3, 4, 3, 3))[0]
    warm_up = draw.choice((0.0, 0.0, 0.02, 0.05, 0.1))
    clip = draw.choice((None, 1.0))
    noise = draw.choice((0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 4.0))
    bases, settings = _bases(base, draw)
    details = [
        what, f"{base}{settings}", f"{steps} steps", schedule, f"warm-up {warm_up:.0%}",
        "clipped" if clip else "", f"gradient noise {noise:g}" if noise else "",
    ]  # fmt: skip
    guess = 2.0 ** round(math.log2(_BASES[base][1] * (0.25 if kind == "fine-tuning" else 1.0)))
    return Task(
        f"g{seed}", ", ".join(detail for detail in details if detail), problem, bases, base, steps, guess,
        schedule, warm_up, clip, noise,
    )  # fmt: skip


def _bases(name: str, draw: Random) -> tuple[Bases, str]:
    decay = draw.choice((0.0, 0.0, 0.01, 0.1))
    beta = draw.choice((0.95, 0.99, 0.999))
    momentum, nesterov = draw.choice((0.9, 0.9, 0.95)), draw.random() < 0.3
    cls = {
        "adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "nadam": torch.optim.NAdam,
        "sgd": torch.optim.SGD, "momentum": torch.optim.SGD, "rmsprop": torch.optim.RMSprop,
        "adagrad": torch.optim.Adagrad, "adafactor": torch.optim.Adafactor, "lion": Lion,
    }.get(name)  # fmt: skip
    settings: dict[str, object] = {  # type: ignore[assignment]
        "adamw": {"betas": (0.9, beta), "fused": True}, "adam": {"betas": (0.9, beta), "fused": True},
        "nadam": {"betas": (0.9, beta)}, "sgd": {"fused": True},
        "momentum": {"momentum": momentum, "nesterov": nesterov, "fused": True},
        "rmsprop": {"alpha": beta}, "adagrad": {}, "adafactor": {}, "lion": {"betas": (0.9, 0.99)}, "muon": {},
    }[name]  # fmt: skip
    # A decay that is coupled to the gradient acts on what Adam divides, and SGD's learning rates are large.
    decay *= {"lion": 3.0, "sgd": 0.01, "momentum": 0.01, "adam": 0.01, "rmsprop": 0.01, "adagrad": 0.01}.get(name, 1.0)

    def bases(model: nn.Module, lr: float) -> list[Optimizer]:
        if cls is None:
            return _muon(model, lr, decay, beta)
        groups = [
            {"params": params, "weight_decay": weight_decay}
            for params, weight_decay in zip(_trainable(model), (decay, 0.0)) if params
        ]  # fmt: skip
        return [cls(groups, lr=lr, **settings)]

    shown = {"decay": decay, **{k: v for k, v in settings.items() if k != "fused"}}
    return bases, " (" + ", ".join(f"{key} {value}" for key, value in shown.items() if value) + ")" if shown else ""


def _trainable(model: nn.Module) -> tuple[list[Tensor], ...]:
    return tuple([p for p in params if p.requires_grad] for params in split_by_decay(model))


def _muon(model: nn.Module, lr: float, decay: float, beta: float) -> list[Optimizer]:
    """Muon for hidden matrices, AdamW for the rest, with updates of equal size."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and "blocks" in name]
    rest = [p for name, p in named if not (p.ndim == 2 and "blocks" in name)]
    bases: list[Optimizer] = [torch.optim.Muon(matrices, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")]
    return bases + ([torch.optim.AdamW(rest, lr=lr, betas=(0.9, beta), weight_decay=decay, fused=True)] if rest else [])
