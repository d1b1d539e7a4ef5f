"""Small problems in NumPy, so that JAX and torch start from the same bits. Imports neither."""

from __future__ import annotations

import math

import numpy as np

STEPS = 50
PROBLEMS = ("regression", "logistic", "network")
BASES = ("sgd", "momentum", "adamw", "adamw_cosine")


def numbers(*shape: int, phase: float) -> np.ndarray:
    """Fixed irregular numbers in [-1, 1]."""
    return np.sin(phase + 12.9898 * np.arange(1, math.prod(shape) + 1) ** 1.1).reshape(shape)


def data() -> tuple[np.ndarray, np.ndarray]:
    """Inputs [32, 5] and targets [32]."""
    x = numbers(32, 5, phase=0.3)
    return x, x[:, 0] - 2.0 * x[:, 1] * x[:, 2] + 0.1 * numbers(32, phase=1.7)


def start(problem: str) -> dict[str, np.ndarray]:
    """The parameters at step 1."""
    if problem == "network":
        return {"w1": 0.5 * numbers(5, 7, phase=2.0), "b1": np.zeros(7), "w2": 0.5 * numbers(7, phase=3.0)}
    return {"w": 0.3 * numbers(5, phase=4.0), "b": np.zeros(1) + 0.2}


def learning_rate(base: str, step: int) -> float:
    """Schedule of ``base`` at ``step``, counted from 0."""
    return 0.5 * (1.0 + math.cos(math.pi * step / STEPS)) if base == "adamw_cosine" else 1.0
