"""Small models and data for generated tasks: nothing is downloaded, and a run takes seconds."""

from __future__ import annotations

import itertools
import math
import pydoc_data
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.training import FIXED_SEED, Batches, Problem, digits, loss_of
from gpt.data import Corpus

__all__ = ["KINDS"]

Make = Callable[[int], Problem]
_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}
_PROSE = Path(pydoc_data.__file__).parent / "topics.py"


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


def _fixed() -> torch.Generator:
    return torch.Generator().manual_seed(FIXED_SEED)


def _multiplier(draw: Random) -> float:
    """1 in half of the tasks, else what moves Adam's best learning rate by up to a decade either way."""
    return 1.0 if draw.random() < 0.5 else 10.0 ** draw.uniform(-1.0, 1.0)


class Dense(nn.Module):
    """A multilayer perceptron of the given widths."""

    def __init__(self, widths: list[int], activation: str, multiplier: float, gain: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths[:-1]):
            layers += [Linear(inputs, outputs, multiplier, gain), _ACTIVATIONS[activation]()]
        self.blocks = nn.Sequential(*layers)
        self.head = Linear(widths[-2], widths[-1], multiplier, gain)

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs without an activation."""
        return self.head(self.blocks(inputs))


def _noisy(labels: Tensor, classes: int, share: float, generator: torch.Generator) -> Tensor:
    """Labels of which ``share`` are replaced by random ones, anew in each batch."""
    if share == 0.0:
        return labels
    random = torch.randint(classes, labels.shape, generator=generator)
    return torch.where(torch.rand(labels.shape, generator=generator) < share, random, labels)


def _sampled(
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
        return Problem(make(), batches(), [sample(_fixed(), held_out)], loss)

    return problem


def _squared(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(model(inputs), targets)


def _digit_images(draw: Random, make: Callable[[], nn.Module]) -> tuple[Make, str]:
    """Classification of digits with new noise in every batch."""
    batch_size, noise = draw.choice((8, 16, 32, 64, 128)), draw.choice((0.1, 0.3, 0.6))
    share = draw.choice((0.0, 0.0, 0.0, 0.1, 0.3))

    def problem(seed: int) -> Problem:
        (inputs, unseen), (labels, truth) = (part.split((1200, 597)) for part in digits())
        generator = torch.Generator().manual_seed(seed)

        def batches() -> Batches:
            while True:
                for part in torch.randperm(len(labels), generator=generator).split(batch_size):
                    if len(part) == batch_size:
                        clean = inputs[part]
                        noisy = clean + noise * torch.randn(clean.shape, generator=generator)
                        yield noisy, _noisy(labels[part], 10, share, generator)

        fixed = _fixed()
        seen = [
            (unseen + noise * torch.randn(unseen.shape, generator=fixed), _noisy(truth, 10, share, fixed))
            for _ in range(4)
        ]
        torch.manual_seed(seed)
        return Problem(make(), batches(), seen)

    return problem, f"batch {batch_size}, noise {noise:g}" + (f", {share:.0%} wrong labels" if share else "")


def mlp(draw: Random) -> tuple[Make, str]:
    """A multilayer perceptron on digits."""
    depth, width, activation = draw.randint(1, 4), draw.choice((16, 32, 64, 128)), draw.choice(list(_ACTIVATIONS))
    multiplier, gain = _multiplier(draw), draw.choice((0.5, 1.0, 2.0))
    make, data = _digit_images(draw, lambda: Dense([64, *[width] * depth, 10], activation, multiplier, gain))
    return make, f"MLP {depth}x{width} {activation}, digits, {data}"


def cnn(draw: Random) -> tuple[Make, str]:
    """A convolutional network on digits, with batch norm or without."""
    width, norm = draw.choice((4, 8, 16)), draw.random() < 0.5

    def make_model() -> nn.Module:
        def stage(inputs: int, outputs: int) -> list[nn.Module]:
            normed: list[nn.Module] = [nn.BatchNorm2d(outputs)] if norm else []
            return [nn.Conv2d(inputs, outputs, 3, padding=1), *normed, nn.ReLU(), nn.MaxPool2d(2)]

        stages = [*stage(1, width), *stage(width, 2 * width)]
        return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *stages, nn.Flatten(), Linear(8 * width, 10))

    make, data = _digit_images(draw, make_model)
    return make, f"CNN {width}{' with batch norm' if norm else ''}, digits, {data}"


def vit(draw: Random) -> tuple[Make, str]:
    """A vision transformer on digits, in patches of 2 x 2."""
    width, depth, multiplier = draw.choice((16, 32)), draw.randint(1, 2), _multiplier(draw)

    def make_model() -> nn.Module:
        patches = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Unfold(2, stride=2))
        return nn.Sequential(patches, _Transposed(), Transformer(4, 10, 16, width, depth, multiplier, False))

    make, data = _digit_images(draw, make_model)
    return make, f"ViT {depth}x{width}, digits, {data}"


class _Transposed(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.transpose(1, 2)


def autoencoder(draw: Random) -> tuple[Make, str]:
    """An autoencoder of digits."""
    width, code, activation = draw.choice((32, 64)), draw.choice((4, 8, 16)), draw.choice(list(_ACTIVATIONS))
    batch_size, multiplier = draw.choice((8, 32, 128)), _multiplier(draw)

    def sample(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        images = digits()[0]
        images = images[:1200] if count == batch_size else images[1200:]
        found = images[torch.randint(len(images), (count,), generator=generator)]
        return found, found

    make = _sampled(
        lambda: Dense([64, width, code, width, 64], activation, multiplier),
        sample, batch_size, _squared,
    )  # fmt: skip
    return make, f"autoencoder {width}-{code} {activation}, digits, batch {batch_size}"


def denoiser(draw: Random) -> tuple[Make, str]:
    """A denoiser of digits at random noise levels, as in diffusion."""
    width, depth, batch_size = draw.choice((64, 128)), draw.randint(2, 3), draw.choice((16, 64, 128))
    multiplier = _multiplier(draw)

    def sample(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        images = digits()[0]
        images = images[:1200] if count == batch_size else images[1200:]
        clean = images[torch.randint(len(images), (count,), generator=generator)]
        level, noise = torch.rand(count, 1, generator=generator), torch.randn(clean.shape, generator=generator)
        return torch.cat([clean * (1 - level) + noise * level, level], dim=1), noise

    make = _sampled(lambda: Dense([65, *[width] * depth, 64], "gelu", multiplier), sample, batch_size, _squared)
    return make, f"denoiser {depth}x{width}, digits, batch {batch_size}"


class _Factors(nn.Module):
    def __init__(self, rows: int, columns: int, rank: int, multiplier: float, size: float) -> None:
        super().__init__()
        self.left = Embedding(rows, rank, multiplier, size)
        self.right = Embedding(columns, rank, multiplier, size)

    def forward(self, pairs: Tensor) -> Tensor:
        return (self.left(pairs[:, 0]) * self.right(pairs[:, 1])).sum(dim=1)


def factorisation(draw: Random) -> tuple[Make, str]:
    """Two embeddings whose inner products fit the observed entries of a matrix of low rank."""
    rows, rank, batch_size = draw.choice((50, 200)), draw.choice((4, 8)), draw.choice((32, 256, 1024))
    noise, size, multiplier = draw.choice((0.0, 0.3, 1.0)), draw.choice((0.03, 0.1, 0.3)), _multiplier(draw)
    fixed = _fixed()
    left, right = (torch.randn(rows, rank, generator=fixed) / rank**0.25 for _ in range(2))

    def sample(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        pairs = torch.randint(rows, (count, 2), generator=generator)
        truth = (left[pairs[:, 0]] * right[pairs[:, 1]]).sum(dim=1)
        return pairs, truth + noise * torch.randn(count, generator=generator)

    make = _sampled(lambda: _Factors(rows, rows, 2 * rank, multiplier, size), sample, batch_size, _squared)
    return make, f"factorisation {rows}, rank {rank}, noise {noise:g}, batch {batch_size}"


class _Output(nn.Module):
    """A linear map to one number, from 0."""

    def __init__(self, inputs: int, multiplier: float, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(start * torch.randn(inputs) / multiplier)
        self.multiplier = multiplier

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ (self.weight * self.multiplier)


def linear_regression(draw: Random) -> tuple[Make, str]:
    """Linear regression with a spectrum that falls as a power, with noise or without."""
    inputs, power = draw.choice((20, 100, 400)), draw.choice((0.0, 0.5, 1.0))
    noise, batch_size, multiplier = draw.choice((0.0, 0.1, 1.0)), draw.choice((4, 16, 64)), _multiplier(draw)
    start, spectrum = draw.choice((0.0, 1.0)), torch.arange(1, inputs + 1) ** -power
    truth = torch.randn(inputs, generator=_fixed())

    def sample(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        found = torch.randn(count, inputs, generator=generator) * spectrum
        return found, found @ truth + noise * torch.randn(count, generator=generator)

    make = _sampled(lambda: _Output(inputs, multiplier, start), sample, batch_size, _squared)
    return make, f"linear regression {inputs}, power {power:g}, noise {noise:g}, batch {batch_size}"


def logistic_regression(draw: Random) -> tuple[Make, str]:
    """Logistic regression with a spectrum that falls as a power; the labels are drawn from a model of that kind."""
    inputs, power, size = draw.choice((20, 100)), draw.choice((0.0, 0.5, 1.0)), draw.choice((0.5, 2.0, 8.0))
    batch_size, multiplier = draw.choice((4, 16, 64)), _multiplier(draw)
    spectrum = torch.arange(1, inputs + 1) ** -power
    truth = size * torch.randn(inputs, generator=_fixed())

    def sample(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        found = torch.randn(count, inputs, generator=generator) * spectrum
        chance = torch.sigmoid(found @ truth)
        return found, (torch.rand(count, generator=generator) < chance).float()

    def loss(model: nn.Module, found: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(found), labels)

    make = _sampled(lambda: _Output(inputs, multiplier, 0.0), sample, batch_size, loss, 4096)
    return make, f"logistic regression {inputs}, power {power:g}, size {size:g}, batch {batch_size}"


def pinn(draw: Random) -> tuple[Make, str]:
    """A physics-informed network: a differential equation of second order on [0, 1] with both ends at 0."""
    width, depth, waves = draw.choice((16, 32)), draw.randint(1, 3), draw.choice((1, 2, 3))
    is_fixed, multiplier = draw.random() < 0.5, _multiplier(draw)

    def sample(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        points = torch.linspace(0, 1, count).unsqueeze(1)
        if not is_fixed and count < 200:
            points = torch.rand(count, 1, generator=generator)
        return points, torch.sin(waves * math.pi * points)

    def loss(model: nn.Module, points: Tensor, truth: Tensor) -> Tensor:
        with torch.enable_grad():
            points = points.clone().requires_grad_()
            value = model(points) * points * (1 - points)
            (slope,) = torch.autograd.grad(value.sum(), points, create_graph=True)
            (curve,) = torch.autograd.grad(slope.sum(), points, create_graph=True)
        residual = curve / (waves * math.pi) ** 2 + truth
        return residual.square().mean()

    make = _sampled(lambda: Dense([1, *[width] * depth, 1], "tanh", multiplier), sample, 32, loss, 200)
    return make, f"PINN {depth}x{width}, {waves} waves, {'fixed' if is_fixed else 'random'} points"


def experts(draw: Random) -> tuple[Make, str]:
    """A mixture of experts that learns a teacher's classes."""
    count, used, width, multiplier = draw.choice((4, 8)), draw.choice((1, 2)), draw.choice((16, 32)), _multiplier(draw)
    batch_size = draw.choice((16, 64, 128))
    fixed = _fixed()
    first, second = torch.randn(16, 64, generator=fixed), torch.randn(64, 6, generator=fixed)

    def sample(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        found = torch.randn(size, 16, generator=generator)
        return found, (torch.sin(found @ first) @ second).argmax(dim=1)

    make = _sampled(lambda: Experts(16, 6, width, count, used, multiplier), sample, batch_size, loss_of, 2048)
    return make, f"{used} of {count} experts of {width}, a teacher's classes, batch {batch_size}"


def graph(draw: Random) -> tuple[Make, str]:
    """Graph convolutions on a random graph with communities: half of the nodes train, all at once."""
    nodes, width, classes, multiplier = draw.choice((200, 400)), draw.choice((16, 64)), 5, _multiplier(draw)
    fixed = _fixed()
    labels = torch.randint(classes, (nodes,), generator=fixed)
    near = labels[:, None] == labels[None, :]
    chance = torch.where(near, 0.05, 0.02)
    upper = torch.triu(torch.rand(nodes, nodes, generator=fixed) < chance, diagonal=1)
    edges = (upper | upper.T).float() + torch.eye(nodes)
    degree = edges.sum(dim=1).rsqrt()
    adjacency = degree[:, None] * edges * degree[None, :]
    features = F.one_hot(labels, 32).float() + 1.5 * torch.randn(nodes, 32, generator=fixed)
    is_seen = torch.rand(nodes, generator=fixed) < 0.5

    def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs)[is_seen], targets[is_seen])

    def problem(seed: int) -> Problem:
        def batches() -> Batches:
            generator = torch.Generator().manual_seed(seed)
            while True:  # dropout of the features, so that they cannot be learned by heart
                yield features * (torch.rand(features.shape, generator=generator) < 0.5) * 2.0, labels

        torch.manual_seed(seed)
        model = Graph(adjacency, 32, width, classes, multiplier)
        return Problem(model, batches(), [(features, labels)], loss)

    return problem, f"graph of {nodes} nodes, width {width}, loss on the training nodes"


@cache
def _corpus(path: Path | None, length: int) -> Corpus:
    return Corpus(path, length)


def _text(make: Callable[[], nn.Module], length: int, batch_size: int, path: Path | None = None) -> Make:
    def problem(seed: int) -> Problem:
        corpus = _corpus(path, length)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            step = 0
            while True:
                tokens = corpus.batch(seed, step, batch_size, slice(None))
                yield tokens[:, :-1], tokens[:, 1:]
                step += 1

        held_out = corpus.batch(FIXED_SEED, 0, 128, slice(None), held_out=True)
        torch.manual_seed(seed)
        return Problem(make(), batches(), [(part[:, :-1], part[:, 1:]) for part in held_out.split(32)])

    return problem


def gpt(draw: Random) -> tuple[Make, str]:
    """A GPT on the bytes of Python's standard library."""
    width, depth, length = draw.choice((24, 32, 48)), draw.randint(1, 3), draw.choice((16, 32))
    batch_size, multiplier = draw.choice((4, 8, 16)), _multiplier(draw)
    make = _text(lambda: Transformer(256, 256, length, width, depth, multiplier, True), length, batch_size)
    return make, f"GPT {depth}x{width}, code, {batch_size} x {length} bytes"


def lstm(draw: Random) -> tuple[Make, str]:
    """An LSTM or GRU on the bytes of Python's standard library."""
    kind, width, depth = draw.choice(("LSTM", "GRU")), draw.choice((24, 48)), draw.randint(1, 2)
    length, batch_size, multiplier = 16, draw.choice((4, 8, 16)), _multiplier(draw)
    make = _text(lambda: Recurrent(kind, 256, width, depth, multiplier), length, batch_size)
    return make, f"{kind} {depth}x{width}, code, {batch_size} x {length} bytes"


_PRETRAINING = 400
_PRETRAINED = {"inputs": 256, "outputs": 256, "length": 32, "width": 32, "depth": 2, "multiplier": 1.0}


@cache
def _pretrained() -> dict[str, Tensor]:
    """A small GPT after :data:`_PRETRAINING` steps of AdamW on code."""
    problem = _text(lambda: Transformer(**_PRETRAINED, is_causal=True), 32, 16)(FIXED_SEED)
    optimizer = torch.optim.AdamW(problem.model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, _PRETRAINING)
    for _ in range(_PRETRAINING):
        optimizer.zero_grad()
        loss_of(problem.model, *next(problem.batches)).backward()
        optimizer.step()
        schedule.step()
    return problem.model.state_dict()


def _fine_tuned() -> Transformer:
    model = Transformer(**_PRETRAINED, is_causal=True)
    model.load_state_dict(_pretrained())
    return model


def fine_tuning(draw: Random) -> tuple[Make, str]:
    """All of a GPT that was trained on code, fine-tuned on prose."""
    batch_size = draw.choice((2, 4, 8, 16))
    return _text(_fine_tuned, 32, batch_size, _PROSE), f"GPT 2x32, fine-tuned on prose, batch {batch_size}"


def lora(draw: Random) -> tuple[Make, str]:
    """Adapters of low rank on a frozen GPT that was trained on code, on prose."""
    batch_size, rank = draw.choice((4, 8, 16)), draw.choice((2, 8))

    def make() -> nn.Module:
        model = _fine_tuned().requires_grad_(False)
        for block in model.blocks:
            for name in ("qkv", "out", "up", "down"):
                setattr(block, name, Adapter(getattr(block, name), rank))
        return model

    return _text(make, 32, batch_size, _PROSE), f"LoRA of rank {rank} on a GPT, prose, batch {batch_size}"


def recall(draw: Random) -> tuple[Make, str]:
    """A transformer or GRU that repeats a random sequence, backwards or shifted in value."""
    tokens, length, width = draw.choice((8, 16)), draw.choice((4, 6)), draw.choice((24, 32))
    kind, batch_size, multiplier = draw.choice(("transformer", "GRU")), draw.choice((16, 64)), _multiplier(draw)
    is_reversed, shift = draw.random() < 0.5, draw.choice((0, 3))

    def sample(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        shown = torch.randint(tokens, (count, length), generator=generator)
        answer = ((shown.flip(1) if is_reversed else shown) + shift) % tokens
        whole = torch.cat([shown, torch.full((count, 1), tokens), answer], dim=1)
        targets = whole[:, 1:].clone()
        targets[:, :length] = -100  # only the answer counts
        return whole[:, :-1], targets

    def make_model() -> nn.Module:
        if kind == "GRU":
            return Recurrent(kind, tokens + 1, width, 1, multiplier)
        return Transformer(tokens + 1, tokens + 1, 2 * length + 1, width, 2, multiplier, True)

    make = _sampled(make_model, sample, batch_size, loss_of, 512)
    return make, f"{kind} {width}, repeats {length} of {tokens} tokens, batch {batch_size}"


KINDS: dict[str, tuple[Callable[[Random], tuple[Make, str]], float]] = {
    "mlp": (mlp, 0.5), "cnn": (cnn, 1.0), "vit": (vit, 2.0), "autoencoder": (autoencoder, 0.5),
    "denoiser": (denoiser, 0.8), "factorisation": (factorisation, 0.3), "linear": (linear_regression, 0.2),
    "logistic": (logistic_regression, 0.2), "pinn": (pinn, 1.0), "experts": (experts, 0.7), "graph": (graph, 1.0),
    "gpt": (gpt, 3.0), "lstm": (lstm, 3.0), "fine-tuning": (fine_tuning, 3.0), "lora": (lora, 4.0),
    "recall": (recall, 2.0),
}  # fmt: skip
"""By name: what draws a problem and describes it, and the milliseconds that a step may be expected to take."""
