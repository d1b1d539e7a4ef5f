"""Tasks of ``benchmark.py tuning``: different models, data, base optimizers and schedules."""

from __future__ import annotations

import pydoc_data
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.data import images, text
from benchmarks.training import FIXED_SEED, Bases, Batches, Problem, Task, split_by_decay, train
from gpt.model import GPT
from gpt.optimizers import Lion, muon_and_adamw


def adamw(weight_decay: float = 0.1, **settings: Any) -> Bases:
    def bases(model: nn.Module, lr: float) -> list[Optimizer]:
        groups = [
            {"params": params, "weight_decay": decay}
            for params, decay in zip(split_by_decay(model), (weight_decay, 0.0))
        ]
        return [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), **settings)]

    return bases


def sgd(model: nn.Module, lr: float) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)]


def plain_sgd(model: nn.Module, lr: float) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=lr)]


def lion(model: nn.Module, lr: float) -> list[Optimizer]:
    groups = [{"params": params, "weight_decay": decay} for params, decay in zip(split_by_decay(model), (1.0, 0.0))]
    return [Lion(groups, lr=lr)]


def muon(model: nn.Module, lr: float) -> list[Optimizer]:
    return muon_and_adamw(list(model.named_parameters()), lr, 0.1)


def _small_gpt() -> GPT:
    return GPT(256, 64, layers=2, width=64, heads=2)


def _large_gpt() -> GPT:
    return GPT(256, 64, layers=2, width=128, heads=4)


@cache
def _pretrained() -> dict[str, Tensor]:
    """Initial weights for fine-tuning: the small GPT after 400 steps of AdamW."""
    task = TASKS["gpt"]
    problem = task.problem(FIXED_SEED)
    train(task, problem, task.bases(problem.model, task.guess), task.schedule)
    return problem.model.state_dict()


def _fine_tuned() -> GPT:
    model = _small_gpt()
    model.load_state_dict(_pretrained())
    return model


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def _linear() -> nn.Module:
    model = nn.Linear(30, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def _convex(batch_size: int) -> Callable[[int], Problem]:
    """Logistic regression on scikit-learn's breast cancer data, standardised; evaluated on the training data."""

    def problem(seed: int) -> Problem:
        from sklearn.datasets import load_breast_cancer

        found = load_breast_cancer()
        inputs = torch.tensor(found.data, dtype=torch.float64)
        inputs = ((inputs - inputs.mean(dim=0)) / inputs.std(dim=0)).float()
        labels = torch.tensor(found.target, dtype=torch.int64)
        generator = torch.Generator().manual_seed(seed)

        def batches() -> Batches:
            while True:
                for part in torch.randperm(len(labels), generator=generator).split(batch_size):
                    yield inputs[part], labels[part]

        return Problem(_linear(), batches(), [(inputs, labels)])

    return problem


_PROSE = Path(pydoc_data.__file__).parent / "topics.py"

_ALL = [
    Task("gpt", "GPT of 0.15M, AdamW", text(_small_gpt, 64, 16), adamw(), "adamw", 400, 4e-3),
    Task("gpt-long", "the same for 1,600 steps", text(_small_gpt, 64, 16), adamw(), "adamw", 1600, 4e-3),
    Task("gpt-large", "GPT of 0.5M, AdamW", text(_large_gpt, 64, 16), adamw(), "adamw", 400, 4e-3),
    Task("gpt-sgd", "GPT, SGD with momentum", text(_small_gpt, 64, 16), sgd, "sgd", 400, 0.5),
    Task("gpt-lion", "GPT, Lion", text(_small_gpt, 64, 16), lion, "lion", 400, 1e-3),
    Task("gpt-muon", "GPT, Muon and AdamW", text(_small_gpt, 64, 16), muon, "muon", 400, 8e-3),
    Task("gpt-batch-4", "GPT, a batch of 4", text(_small_gpt, 64, 4), adamw(), "adamw", 400, 4e-3),
    Task("gpt-batch-64", "GPT, a batch of 64", text(_small_gpt, 64, 64), adamw(), "adamw", 200, 8e-3),
    Task("gpt-constant", "GPT, constant lr", text(_small_gpt, 64, 16), adamw(), "adamw", 400, 2e-3, "constant"),
    Task(
        "gpt-constant-long",
        "the same, 2,400 steps",
        text(_small_gpt, 64, 16),
        adamw(),
        "adamw",
        2400,
        2e-3,
        "constant",
    ),
    Task("gpt-wsd", "GPT, WSD", text(_small_gpt, 64, 16), adamw(), "adamw", 400, 4e-3, "wsd"),
    Task("fine-tune", "GPT, fine-tuned on prose", text(_fine_tuned, 64, 16, _PROSE), adamw(), "adamw", 200, 1e-3),
    Task("mlp", "MLP on digits, AdamW", images(_mlp, 32), adamw(), "adamw", 400, 8e-3),
    Task("cnn-sgd", "CNN on digits, SGD with momentum", images(_cnn, 32), sgd, "sgd", 400, 0.1),
    Task("mlp-long", "the MLP, 4,000 steps", images(_mlp, 32), adamw(), "adamw", 4000, 8e-3),
    Task("cnn-sgd-long", "the CNN, 3,000 steps", images(_cnn, 32), sgd, "sgd", 3000, 0.05),
    Task("cnn-sgd-constant-long", "the same, constant lr", images(_cnn, 32), sgd, "sgd", 3000, 0.025, "constant"),
    Task("convex", "logistic regression, SGD, linear", _convex(32), plain_sgd, "sgd", 400, 1.0, "linear", 0.0, None),
    Task("convex-constant", "the same, constant lr", _convex(32), plain_sgd, "sgd", 400, 0.5, "constant", 0.0, None),
]
TASKS = {task.name: task for task in _ALL}
