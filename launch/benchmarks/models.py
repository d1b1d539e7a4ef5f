"""The small models of generated tasks."""

from __future__ import annotations

import itertools
import math
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


class Linear(nn.Linear):
    """A linear map whose weights are stored divided by ``multiplier``, which moves the best learning rate."""

    def __init__(self, inputs: int, outputs: int, multiplier: float = 1.0, gain: float = 1.0) -> None:
        super().__init__(inputs, outputs)
        self.multiplier = multiplier
        with torch.no_grad():
            self.weight.mul_(gain / multiplier)
            self.bias.div_(multiplier)

    def forward(self, inputs: Tensor) -> Tensor:
        """The map."""
        return F.linear(inputs, self.weight * self.multiplier, self.bias * self.multiplier)


class Embedding(nn.Embedding):
    """An embedding whose weights are stored divided by ``multiplier``."""

    def __init__(self, count: int, width: int, multiplier: float = 1.0, size: float = 0.02) -> None:
        super().__init__(count, width)
        self.multiplier = multiplier
        nn.init.normal_(self.weight, std=size / multiplier)

    def forward(self, inputs: Tensor) -> Tensor:
        """The rows of ``inputs``."""
        return super().forward(inputs) * self.multiplier


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, multiplier: float, *, is_causal: bool) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = Linear(width, 3 * width, multiplier), Linear(width, width, multiplier)
        self.up, self.down = Linear(width, 4 * width, multiplier), Linear(4 * width, width, multiplier)
        self.heads, self.is_causal = heads, is_causal

    def forward(self, x: Tensor) -> Tensor:
        """Shape [batch, length, width] in and out."""
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Transformer(nn.Module):
    """Predicts each next token; or, without ``is_causal``, one class from a sequence of vectors."""

    def __init__(
        self, inputs: int, outputs: int, length: int, width: int, depth: int, multiplier: float, is_causal: bool
    ) -> None:
        super().__init__()
        self.embedding = Embedding(inputs, width, multiplier) if is_causal else Linear(inputs, width, multiplier)
        self.place = nn.Parameter(torch.randn(length, width) * 0.02 / multiplier)
        self.blocks = nn.ModuleList(Block(width, 2, multiplier, is_causal=is_causal) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = Linear(width, outputs, multiplier)
        self.multiplier, self.is_causal = multiplier, is_causal

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits."""
        x = self.embedding(inputs) + self.multiplier * self.place[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x if self.is_causal else x.mean(dim=1))


class Recurrent(nn.Module):
    """An LSTM or GRU over embedded tokens."""

    def __init__(self, kind: str, tokens: int, width: int, depth: int, multiplier: float) -> None:
        super().__init__()
        self.embedding = Embedding(tokens, width, multiplier, 0.3)
        cell = nn.LSTM if kind == "LSTM" else nn.GRU
        self.blocks = cell(width, width, depth, batch_first=True)
        self.head = Linear(width, tokens, multiplier)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of each next token."""
        return self.head(self.blocks(self.embedding(inputs))[0])


class Experts(nn.Module):
    """A mixture of experts with a gate that sends each input to one or two of them."""

    def __init__(self, inputs: int, outputs: int, width: int, count: int, used: int, multiplier: float) -> None:
        super().__init__()
        self.gate = Linear(inputs, count, multiplier)
        self.up = nn.Parameter(torch.randn(count, inputs, width) / math.sqrt(inputs) / multiplier)
        self.down = nn.Parameter(torch.randn(count, width, outputs) / math.sqrt(width) / multiplier)
        self.used, self.multiplier = used, multiplier

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs of the chosen experts, weighed by the gate."""
        chances = self.gate(inputs).softmax(dim=-1)
        top, chosen = chances.topk(self.used, dim=-1)
        weights = torch.zeros_like(chances).scatter(-1, chosen, top)
        hidden = F.relu(torch.einsum("bi,eiw->ebw", inputs, self.up * self.multiplier))
        return torch.einsum("ebw,ewo,be->bo", hidden, self.down * self.multiplier, weights)


class Graph(nn.Module):
    """Two graph convolutions over a fixed normalised adjacency matrix."""

    def __init__(self, adjacency: Tensor, inputs: int, width: int, classes: int, multiplier: float) -> None:
        super().__init__()
        self.register_buffer("adjacency", adjacency)
        self.blocks = Linear(inputs, width, multiplier)
        self.head = Linear(width, classes, multiplier)

    def forward(self, features: Tensor) -> Tensor:
        """Logits of every node."""
        return self.adjacency @ self.head(F.relu(self.adjacency @ self.blocks(features)))


class Adapter(nn.Module):
    """LoRA: a frozen linear map plus a product of two small matrices, the second of which starts at 0."""

    def __init__(self, linear: Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.first = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.second = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        """The map."""
        return self.linear(inputs) + F.linear(F.linear(inputs, self.first), self.second)


class Dense(nn.Module):
    """A multilayer perceptron of the given widths."""

    def __init__(self, widths: list[int], activation: str, multiplier: float, gain: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths[:-1]):
            layers += [Linear(inputs, outputs, multiplier, gain), ACTIVATIONS[activation]()]
        self.blocks = nn.Sequential(*layers)
        self.head = Linear(widths[-2], widths[-1], multiplier, gain)

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs without an activation."""
        return self.head(self.blocks(inputs))


class Transposed(nn.Module):
    """Exchanges channels and places."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Shape [batch, channels, places] in."""
        return inputs.transpose(1, 2)


class Factors(nn.Module):
    """Inner products of two embeddings."""

    def __init__(self, rows: int, columns: int, rank: int, multiplier: float, size: float) -> None:
        super().__init__()
        self.left = Embedding(rows, rank, multiplier, size)
        self.right = Embedding(columns, rank, multiplier, size)

    def forward(self, pairs: Tensor) -> Tensor:
        """The entries at ``pairs``."""
        return (self.left(pairs[:, 0]) * self.right(pairs[:, 1])).sum(dim=1)


class Output(nn.Module):
    """A linear map to one number, from 0."""

    def __init__(self, inputs: int, multiplier: float, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(start * torch.randn(inputs) / multiplier)
        self.multiplier = multiplier

    def forward(self, inputs: Tensor) -> Tensor:
        """Shape [batch]."""
        return inputs @ (self.weight * self.multiplier)


def multiplier_of(draw: Random) -> float:
    """1 in half of the tasks, else what moves Adam's best learning rate by up to a decade either way."""
    return 1.0 if draw.random() < 0.5 else 10.0 ** draw.uniform(-1.0, 1.0)
