"""The losses of the problems, in torch."""

from __future__ import annotations

import torch
from torch import Tensor


def loss(problem: str, p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    if problem == "network":
        return ((torch.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] - y) ** 2).mean()
    out = x @ p["w"] + p["b"]
    if problem == "logistic":
        return torch.log1p(torch.exp(-torch.where(y > 0, 1.0, -1.0).to(x) * out)).mean()
    return ((out - y) ** 2).mean()
