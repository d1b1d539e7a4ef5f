"""The data of tasks: text and digits that every machine has, and batches that are drawn without an end."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.training import FIXED_SEED, Batches, Problem
from gpt.data import Corpus

Make = Callable[[int], Problem]
"""Creates the problem of a seed."""
HELD_OUT = 256
"""How many sequences are held out where nothing else is said."""


def fixed_generator() -> torch.Generator:
    """The same random numbers for every seed."""
    return torch.Generator().manual_seed(FIXED_SEED)


def sampled(
    make: Callable[[], nn.Module],
    sample: Callable[[torch.Generator, int], tuple[Tensor, Tensor]],
    batch_size: int,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
    held_out: int = 1024,
) -> Make:
    """Data without an end: each batch is drawn anew, the held-out data once."""

    def problem(seed: int) -> Problem:
        generator = torch.Generator().manual_seed(seed + 1)

        def batches() -> Batches:
            while True:
                yield sample(generator, batch_size)

        torch.manual_seed(seed)
        return Problem(make(), batches(), [sample(fixed_generator(), held_out)], loss)

    return problem


@cache
def _corpus(path: Path | None, seq_len: int) -> Corpus:
    return Corpus(path, seq_len)


def text(
    make: Callable[[], nn.Module], seq_len: int, batch_size: int, path: Path | None = None, held_out: int | None = None
) -> Make:
    """Next bytes of a file, or of Python's standard library; ``held_out``: how many sequences are,
    by default :data:`HELD_OUT`."""

    def problem(seed: int) -> Problem:
        corpus = _corpus(path, seq_len)

        def batches() -> Batches:
            step = 0
            while True:
                tokens = corpus.batch(seed, step, batch_size, slice(None))
                yield tokens[:, :-1], tokens[:, 1:]
                step += 1

        count = HELD_OUT if held_out is None else held_out
        unseen = corpus.batch(FIXED_SEED, 0, count, slice(None), held_out=True)
        parts = [(part[:, :-1], part[:, 1:]) for part in unseen.split(32)]
        torch.manual_seed(seed)
        return Problem(make(), batches(), parts)

    return problem


@cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels in a random order: inputs in [0, 1], and labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(FIXED_SEED))
    return torch.tensor(found.data / 16, dtype=torch.float32)[order], torch.tensor(found.target)[order]


def images(
    make: Callable[[], nn.Module], batch_size: int, noise: float = 0.3, wrong: float = 0.0, drop_last: bool = False
) -> Make:
    """Classification of digits, with new noise in every batch.

    Args:
        make: Makes the model.
        batch_size: Of all batches, or of all but the last of an epoch.
        noise: Standard deviation; pixels are in [0, 1].
        wrong: The share of labels that are random.
        drop_last: Whether to leave out the last batch of an epoch if it is smaller.
    """

    def problem(seed: int) -> Problem:
        (inputs, unseen), (labels, truth) = (part.split((1200, 597)) for part in digits())
        generator = torch.Generator().manual_seed(seed)

        def batches() -> Batches:
            while True:
                for part in torch.randperm(len(labels), generator=generator).split(batch_size):
                    if len(part) == batch_size or not drop_last:
                        clean = inputs[part]
                        noisy = clean + noise * torch.randn(clean.shape, generator=generator)
                        yield noisy, _noisy(labels[part], 10, wrong, generator)

        fixed = fixed_generator()
        held_out = [
            (unseen + noise * torch.randn(unseen.shape, generator=fixed), _noisy(truth, 10, wrong, fixed))
            for _ in range(4)
        ]
        torch.manual_seed(seed)
        return Problem(make(), batches(), held_out)

    return problem


def _noisy(labels: Tensor, classes: int, share: float, generator: torch.Generator) -> Tensor:
    """Labels of which ``share`` are replaced by random ones, anew in each batch."""
    if share == 0.0:
        return labels
    random = torch.randint(classes, labels.shape, generator=generator)
    return torch.where(torch.rand(labels.shape, generator=generator) < share, random, labels)
