"""Generated problems of images, vectors, points and graphs. Nothing is downloaded, and a run takes seconds."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.data import Make, digits, fixed_generator, images, sampled
from benchmarks.models import (
    ACTIVATIONS,
    Dense,
    Experts,
    Factors,
    Graph,
    Linear,
    Output,
    Transformer,
    Transposed,
    multiplier_of,
)
from benchmarks.training import Batches, Problem, loss_of


def _digit_images(draw: Random, make: Callable[[], nn.Module]) -> tuple[Make, str]:
    batch_size, noise = draw.choice((8, 16, 32, 64, 128)), draw.choice((0.1, 0.3, 0.6))
    wrong = draw.choice((0.0, 0.0, 0.0, 0.1, 0.3))
    what = f"batch {batch_size}, noise {noise:g}" + (f", {wrong:.0%} wrong labels" if wrong else "")
    return images(make, batch_size, noise, wrong, drop_last=True), what


def squared_error(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(model(inputs), targets)


def mlp(draw: Random) -> tuple[Make, str]:
    """A multilayer perceptron on digits."""
    depth, width, activation = draw.randint(1, 4), draw.choice((16, 32, 64, 128)), draw.choice(list(ACTIVATIONS))
    multiplier, gain = multiplier_of(draw), draw.choice((0.5, 1.0, 2.0))
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
    width, depth, multiplier = draw.choice((16, 32)), draw.randint(1, 2), multiplier_of(draw)

    def make_model() -> nn.Module:
        patches = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Unfold(2, stride=2))
        return nn.Sequential(patches, Transposed(), Transformer(4, 10, 16, width, depth, multiplier, False))

    make, data = _digit_images(draw, make_model)
    return make, f"ViT {depth}x{width}, digits, {data}"


def autoencoder(draw: Random) -> tuple[Make, str]:
    """An autoencoder of digits."""
    width, code, activation = draw.choice((32, 64)), draw.choice((4, 8, 16)), draw.choice(list(ACTIVATIONS))
    batch_size, multiplier = draw.choice((8, 32, 128)), multiplier_of(draw)

    def sample(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        images = digits()[0]
        images = images[:1200] if count == batch_size else images[1200:]
        found = images[torch.randint(len(images), (count,), generator=generator)]
        return found, found

    make = sampled(
        lambda: Dense([64, width, code, width, 64], activation, multiplier),
        sample, batch_size, squared_error,
    )  # fmt: skip
    return make, f"autoencoder {width}-{code} {activation}, digits, batch {batch_size}"


def denoiser(draw: Random) -> tuple[Make, str]:
    """A denoiser of digits at random noise levels, as in diffusion."""
    width, depth, batch_size = draw.choice((64, 128)), draw.randint(2, 3), draw.choice((16, 64, 128))
    multiplier = multiplier_of(draw)

    def sample(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        images = digits()[0]
        images = images[:1200] if count == batch_size else images[1200:]
        clean = images[torch.randint(len(images), (count,), generator=generator)]
        level, noise = torch.rand(count, 1, generator=generator), torch.randn(clean.shape, generator=generator)
        return torch.cat([clean * (1 - level) + noise * level, level], dim=1), noise

    make = sampled(lambda: Dense([65, *[width] * depth, 64], "gelu", multiplier), sample, batch_size, squared_error)
    return make, f"denoiser {depth}x{width}, digits, batch {batch_size}"


def factorisation(draw: Random) -> tuple[Make, str]:
    """Two embeddings whose inner products fit the observed entries of a matrix of low rank."""
    rows, rank, batch_size = draw.choice((50, 200)), draw.choice((4, 8)), draw.choice((32, 256, 1024))
    noise, size, multiplier = draw.choice((0.0, 0.3, 1.0)), draw.choice((0.03, 0.1, 0.3)), multiplier_of(draw)
    fixed = fixed_generator()
    left, right = (torch.randn(rows, rank, generator=fixed) / rank**0.25 for _ in range(2))

    def sample(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        pairs = torch.randint(rows, (count, 2), generator=generator)
        truth = (left[pairs[:, 0]] * right[pairs[:, 1]]).sum(dim=1)
        return pairs, truth + noise * torch.randn(count, generator=generator)

    make = sampled(lambda: Factors(rows, rows, 2 * rank, multiplier, size), sample, batch_size, squared_error)
    return make, f"factorisation {rows}, rank {rank}, noise {noise:g}, batch {batch_size}"


def linear_regression(draw: Random) -> tuple[Make, str]:
    """Linear regression with a spectrum that falls as a power, with noise or without."""
    inputs, power = draw.choice((20, 100, 400)), draw.choice((0.0, 0.5, 1.0))
    noise, batch_size, multiplier = draw.choice((0.0, 0.1, 1.0)), draw.choice((4, 16, 64)), multiplier_of(draw)
    start, spectrum = draw.choice((0.0, 1.0)), torch.arange(1, inputs + 1) ** -power
    truth = torch.randn(inputs, generator=fixed_generator())

    def sample(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        found = torch.randn(count, inputs, generator=generator) * spectrum
        return found, found @ truth + noise * torch.randn(count, generator=generator)

    make = sampled(lambda: Output(inputs, multiplier, start), sample, batch_size, squared_error)
    return make, f"linear regression {inputs}, power {power:g}, noise {noise:g}, batch {batch_size}"


def logistic_regression(draw: Random) -> tuple[Make, str]:
    """Logistic regression with a spectrum that falls as a power; the labels are drawn from a model of that kind."""
    inputs, power, size = draw.choice((20, 100)), draw.choice((0.0, 0.5, 1.0)), draw.choice((0.5, 2.0, 8.0))
    batch_size, multiplier = draw.choice((4, 16, 64)), multiplier_of(draw)
    spectrum = torch.arange(1, inputs + 1) ** -power
    truth = size * torch.randn(inputs, generator=fixed_generator())

    def sample(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        found = torch.randn(count, inputs, generator=generator) * spectrum
        chance = torch.sigmoid(found @ truth)
        return found, (torch.rand(count, generator=generator) < chance).float()

    def loss(model: nn.Module, found: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(found), labels)

    make = sampled(lambda: Output(inputs, multiplier, 0.0), sample, batch_size, loss, 4096)
    return make, f"logistic regression {inputs}, power {power:g}, size {size:g}, batch {batch_size}"


def pinn(draw: Random) -> tuple[Make, str]:
    """A physics-informed network: a differential equation of second order on [0, 1] with both ends at 0."""
    width, depth, waves = draw.choice((16, 32)), draw.randint(1, 3), draw.choice((1, 2, 3))
    is_fixed, multiplier = draw.random() < 0.5, multiplier_of(draw)

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

    make = sampled(lambda: Dense([1, *[width] * depth, 1], "tanh", multiplier), sample, 32, loss, 200)
    return make, f"PINN {depth}x{width}, {waves} waves, {'fixed' if is_fixed else 'random'} points"


def experts(draw: Random) -> tuple[Make, str]:
    """A mixture of experts that learns a teacher's classes."""
    count, used, width, multiplier = (
        draw.choice((4, 8)),
        draw.choice((1, 2)),
        draw.choice((16, 32)),
        multiplier_of(draw),
    )
    batch_size = draw.choice((16, 64, 128))
    fixed = fixed_generator()
    first, second = torch.randn(16, 64, generator=fixed), torch.randn(64, 6, generator=fixed)

    def sample(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        found = torch.randn(size, 16, generator=generator)
        return found, (torch.sin(found @ first) @ second).argmax(dim=1)

    make = sampled(lambda: Experts(16, 6, width, count, used, multiplier), sample, batch_size, loss_of, 2048)
    return make, f"{used} of {count} experts of {width}, a teacher's classes, batch {batch_size}"


def graph(draw: Random) -> tuple[Make, str]:
    """Graph convolutions on a random graph with communities: half of the nodes train, all at once."""
    nodes, width, classes, multiplier = draw.choice((200, 400)), draw.choice((16, 64)), 5, multiplier_of(draw)
    fixed = fixed_generator()
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
