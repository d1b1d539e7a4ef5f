"""Stages of a pipeline with other learning rates or base optimizers learn the scale of one process."""

from __future__ import annotations

import logging
import logging.handlers
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from manic import Mechanic
from manic.checkpoint import Checkpointer
from manic.testing import ranks
from manic.tuners.registry import TUNERS

STEPS = 30
# The learning rate of each of three layers by the step.
SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "same": lambda layer, step: 1 - step / 40,
    "staggered": lambda layer, step: [1 - step / 40, min(1.0, step / 10), 1.0][layer],
    "embedding falls": lambda layer, step: [10 * max(0.01, 1 - step / 15), 1 - step / 40, 1 - step / 40][layer],
    "one stage at 0": lambda layer, step: [0.0, 1.0, 0.5][layer],
}


def make_layers() -> list[Tensor]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((4, 6), (5, 4), (3, 5))]


def owned(world_size: int) -> list[int]:
    """The layers of this rank: the first stage has one, the second two."""
    return [0] if dist.get_rank() < world_size // 2 else [1, 2]


def alone() -> dist.ProcessGroup:
    return [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]


def adamw(parameter: Tensor) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter], lr=1.0)


def muon(parameter: Tensor) -> torch.optim.Optimizer:
    return torch.optim.Muon([parameter], lr=1.0)


def train(
    optimizer: Mechanic, layers: list[Tensor], held: list[int], lr: Callable[[int, int], float], steps: range
) -> list[float]:
    scales = []
    for step in steps:
        for layer, group in zip(held, optimizer.param_groups):
            group["lr"] = lr(layer, step)
        for layer in held:
            noise = torch.randn(layers[layer].shape, generator=torch.Generator().manual_seed(10 * step + layer))
            layers[layer].grad = layers[layer].detach() - 1.0 + 0.3 * noise.double()
        optimizer.step()
        scales.append(float(optimizer.scale))
    return scales


def in_stages(bases: list[Any], variant: str, lr: Callable[[int, int], float]) -> tuple[Mechanic, list[Tensor]]:
    """Train on one process and in stages, and compare the scales; return what was trained in stages."""
    whole, every = make_layers(), [0, 1, 2]
    one = Mechanic(
        [make(layer) for make, layer in zip(bases, whole)], process_group=alone(), variant=variant, s_init=1e-2
    )
    expected = train(one, whole, every, lr, range(STEPS))
    layers, held = make_layers(), owned(dist.get_world_size())
    optimizer = Mechanic([bases[i](layers[i]) for i in held], pipeline_stages=2, variant=variant, s_init=1e-2)
    assert train(optimizer, layers, held, lr, range(STEPS)) == pytest.approx(expected, rel=1e-9)
    optimizer.check_consistency()
    assert float(optimizer.metrics()["grad_norm"]) == pytest.approx(float(one.metrics()["grad_norm"]), rel=1e-9)
    return optimizer, layers


@ranks(2)
@pytest.mark.parametrize("variant", ["multiplicative", "optax"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_with_schedules_of_their_own(schedule: str, variant: str) -> None:
    in_stages([adamw] * 3, variant, SCHEDULES[schedule])


@ranks(4)
def test_stages_of_several_ranks_with_schedules_of_their_own() -> None:
    in_stages([adamw] * 3, "multiplicative", SCHEDULES["staggered"])


@ranks(2)
def test_a_learning_rate_that_is_nan_in_one_stage_raises_on_every_rank() -> None:
    layers, held = make_layers(), owned(2)
    optimizer = Mechanic([adamw(layers[i]) for i in held], pipeline_stages=2, variant="multiplicative")
    with pytest.raises(RuntimeError, match="step 1 was not taken: a learning rate is nan"):
        train(optimizer, layers, held, lambda layer, step: [1.0, float("nan"), 1.0][layer], range(1))


@ranks(2)
@pytest.mark.parametrize("variant", TUNERS)
@pytest.mark.parametrize("bases", [[adamw, adamw, adamw], [adamw, muon, adamw], [muon, adamw, muon]])
def test_stages_with_bases_of_their_own(bases: list[Any], variant: str) -> None:
    """The second stage has one base optimizer more than the first, or others."""
    in_stages(bases, variant, SCHEDULES["same"])


@ranks(4)
def test_other_bases_within_a_stage_are_refused() -> None:
    layers, held = make_layers(), owned(4)
    bases = [adamw, muon if dist.get_rank() == 2 else adamw, adamw]
    optimizer = Mechanic([bases[i](layers[i]) for i in held], pipeline_stages=2)
    with pytest.raises(ValueError, match=r"different settings: .*base optimizers \['Muon', 'AdamW'\]"):
        train(optimizer, layers, held, SCHEDULES["same"], range(1))


class Stage(nn.Module):
    def __init__(self, layers: list[Tensor], held: list[int]) -> None:
        super().__init__()
        self.layers = nn.ParameterDict({str(i): layers[i] for i in held})


@ranks(2)
def test_a_checkpoint_of_stages_with_bases_of_their_own(tmp_path: Path) -> None:
    bases, lr, held = [muon, adamw, muon], SCHEDULES["staggered"], owned(2)
    runs = []
    for part in range(2):
        layers = make_layers()
        made = [bases[i](layers[i]) for i in held]
        optimizer = Mechanic(made, pipeline_stages=2, s_init=1e-2)
        checkpointer = Checkpointer(tmp_path / "run", Stage(layers, held), optimizer)
        if part == 0:
            train(optimizer, layers, held, lr, range(8))
            checkpointer.save(8)
        else:
            checkpointer.load()
        runs.append(train(optimizer, layers, held, lr, range(8, 16)))
        optimizer.check_consistency()
    assert runs[0] == runs[1]


@ranks(2)
def test_warns_of_a_runaway_in_another_stage() -> None:
    """The first rank logs; the learning rate that S makes too large is the second's."""
    parameter = torch.full((3,), 1e8 + dist.get_rank(), dtype=torch.float64, requires_grad=True)
    optimizer = Mechanic(torch.optim.SGD([parameter], lr=(1e-12, 1.0)[dist.get_rank()]), pipeline_stages=2)
    handler = logging.handlers.BufferingHandler(100)
    logging.getLogger("manic").addHandler(handler)
    try:
        for _ in range(2):
            parameter.grad = torch.full_like(parameter, 1e-3)
            optimizer.step()
    finally:
        logging.getLogger("manic").removeHandler(handler)
    messages = [record.getMessage() for record in handler.buffer]
    assert any("probably run away" in message for message in messages) == (dist.get_rank() == 0), messages


@ranks(4)
@pytest.mark.parametrize("is_dtensor", [False, True])
@pytest.mark.parametrize("declares", [False, True])
def test_a_weight_that_two_stages_share(declares: bool, is_dtensor: bool) -> None:
    """An embedding tied to the output layer is refused, or, declared, counted as one process counts it."""
    stage = dist.get_rank() // 2
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "shard"))["shard"]

    def place(value: Tensor, is_split: bool) -> Tensor:
        return distribute_tensor(value, mesh, [Shard(0)]) if is_split else value

    runs: list[list[float]] = []
    for whole in (True, False):
        is_split = is_dtensor and not whole
        layers = make_layers()
        held = {0: layers[0], **({1: layers[1], 2: layers[2]} if whole else {1 + stage: layers[1 + stage]})}
        params = {index: nn.Parameter(place(layer.detach(), is_split)) for index, layer in held.items()}
        tied = {"params": [params[0]], **({"expert_parallel": True} if declares and not whole else {})}
        groups: list[dict[str, Any]] = [tied, {"params": [params[index] for index in params if index]}]
        base = torch.optim.AdamW(groups, lr=1.0)
        options = {"process_group": alone()} if whole else {"pipeline_stages": 2}
        optimizer = Mechanic(base, s_init=1e-2, **options)
        runs.append([])
        for step in range(10):
            for index, p in params.items():
                noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + index)).double()
                p.grad = p.detach() - 1.0 + 0.3 * place(noise, is_split)
            if not whole and not declares:
                expected, found = (1, 2) if is_dtensor else (2, 4)
                words = rf"parameter 0 of group 0, .* expected on {expected} rank\(s\), is on {found} .*tied embedding"
                with pytest.raises(ValueError, match=words):
                    optimizer.step()
                return
            optimizer.step()
            runs[-1].append(float(optimizer.scale))
        optimizer.check_consistency()
    assert runs[1] == pytest.approx(runs[0], rel=1e-9)


@ranks(2)
def test_stages_may_start_alike() -> None:
    """Layers that are initialized by one seed, and not shared, have gradients of their own."""
    layers = make_layers()
    parameters = [layers[0], layers[1 + dist.get_rank()]]
    optimizer = Mechanic(torch.optim.SGD(parameters, lr=1.0), pipeline_stages=2)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(dist.get_rank())).double()
    optimizer.step()
    norm = torch.stack([each.detach().norm() for each in [layers[0], *layers]]).norm()
    assert float(optimizer.metrics()["param_norm"]) == pytest.approx(float(norm), rel=1e-2)
