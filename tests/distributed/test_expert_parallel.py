"""Experts that differ between ranks: the scale is one process's, declared or by placements; else all ranks raise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from manic import Mechanic
from manic.checkpoint import Checkpointer
from manic.distributed.layout import local
from manic.testing import ranks, run
from support.experts import alone, draw

EXPERTS, SHAPES, STEPS = 4, {"weight": (5, 6), "bias": (5,)}, 20


class Problem:
    """A dense layer and four experts, whose gradients are elementwise, so that every rank knows those of its shards.

    Args:
        place: Places a tensor of an expert (its number) or the dense layer (``None``); ``None``: not on this rank.
        start: ``"random"``, ``"alike"`` (every expert is a copy of one), or ``"zero"``.
        drops_tokens: Whether each expert has no gradient in every fourth step, the first expert in the first step.
    """

    def __init__(self, place: Callable[..., Tensor | None], start: str = "random", drops_tokens: bool = False) -> None:
        self.place, self.drops_tokens = place, drops_tokens
        self.held: list[tuple[int | None, str, Tensor]] = []
        for expert in (None, *range(EXPERTS)):
            for seed, (name, shape) in enumerate(SHAPES.items()):
                alike = 0 if expert is None or start == "alike" else 10 * expert
                value = draw(alike + seed, shape)
                if expert is not None and (start == "zero" or name == "bias"):
                    value = torch.zeros_like(value)
                placed = place(value, expert)
                if placed is not None:
                    self.held.append((expert, name, placed.requires_grad_()))

    def groups(self, **of_experts: Any) -> list[dict[str, Any]]:
        return [
            {"params": [p for expert, _, p in self.held if expert is None]},
            {"params": [p for expert, _, p in self.held if expert is not None], **of_experts},
        ]

    def give_gradients(self, step: int) -> None:
        for expert, name, parameter in self.held:
            number = EXPERTS if expert is None else expert
            parameter.grad = None
            if self.drops_tokens and (step + number) % EXPERTS == 0 and expert is not None:
                continue
            noise = self.place(draw(1000 * step + 10 * number + len(name), SHAPES[name]), expert)
            assert noise is not None
            parameter.grad = parameter.detach() - 1.0 + 0.3 * noise


def on_one_process(value: Tensor, expert: int | None) -> Tensor:
    return value.clone()


def two_meshes(value: Tensor, expert: int | None) -> Tensor | None:
    """FSDP over the data-parallel ranks alone, of which there are two groups with other experts."""
    mesh = mesh_2d()
    if expert is not None and expert // 2 != mesh["ep"].get_local_rank():
        return None
    return distribute_tensor(value, mesh["dp"], [Shard(0)])


def plain(value: Tensor, expert: int | None) -> Tensor | None:
    return None if expert is not None and expert != dist.get_rank() else value.clone()


def plain_twice(value: Tensor, expert: int | None) -> Tensor | None:
    return None if expert is not None and expert // 2 != dist.get_rank() % 2 else value.clone()


def plain_uneven(value: Tensor, expert: int | None) -> Tensor | None:
    """Three experts on the first rank, one on the second, none on the others."""
    return None if expert is not None and expert // 3 != dist.get_rank() else value.clone()


def in_second_stage(value: Tensor, expert: int | None) -> Tensor | None:
    """Of two stages of two ranks each, the first has the dense layer, the second two experts on each rank."""
    on_rank = dist.get_rank() < 2 if expert is None else 2 + expert // 2 == dist.get_rank()
    return value.clone() if on_rank else None


_meshes: dict[Any, DeviceMesh] = {}


def mesh_2d() -> DeviceMesh:
    key = dist.group.WORLD
    if key not in _meshes:
        _meshes.clear()
        _meshes[key] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    return _meshes[key]


def make(
    problem: Problem, variant: str, group: dist.ProcessGroup | None = None, stages: int = 1, **of_experts: Any
) -> Mechanic:
    base = torch.optim.AdamW(problem.groups(**of_experts), lr=1.0, weight_decay=0.1)
    return Mechanic(base, variant=variant, s_init=1e-2, process_group=group, pipeline_stages=stages)


def scales(problem: Problem, optimizer: Mechanic, steps: range) -> list[float]:
    found = []
    for step in steps:
        problem.give_gradients(step)
        optimizer.step()
        found.append(float(optimizer.scale))
    return found


@ranks(4)
@pytest.mark.parametrize("variant", ["optax", "multiplicative"])
@pytest.mark.parametrize(("place", "start", "drops_tokens"), [
    (two_meshes, "random", False), (two_meshes, "random", True), (two_meshes, "alike", False),
    (plain, "random", True), (plain, "alike", False), (plain, "zero", False),
    (plain_twice, "random", True), (plain_twice, "alike", False), (plain_twice, "zero", False),
    (plain_uneven, "random", True), (in_second_stage, "random", True), (in_second_stage, "alike", False),
])  # fmt: skip
def test_declared_experts(place: Callable[..., Tensor | None], start: str, drops_tokens: bool, variant: str) -> None:
    one = Problem(on_one_process, start, drops_tokens)
    expected = scales(one, make(one, variant, alone()), range(STEPS))
    problem = Problem(place, start, drops_tokens)
    optimizer = make(problem, variant, stages=2 if place is in_second_stage else 1, expert_parallel=True)
    optimizer.check_consistency()  # also before the first step
    found = scales(problem, optimizer, range(STEPS))
    assert found == pytest.approx(expected, rel=1e-9)
    optimizer.check_consistency()


@ranks(4)
@pytest.mark.parametrize("variant", ["optax", "multiplicative"])
@pytest.mark.parametrize("sizes", [(4,), (2, 2)])
def test_experts_whose_placements_show_them_need_no_declaration(sizes: tuple[int, ...], variant: str) -> None:
    mesh = init_device_mesh("cpu", sizes)
    placements = [*[Replicate()] * (len(sizes) - 1), Shard(0)]
    runs: list[list[float]] = []
    for group in (alone(), None):
        experts = draw(0, (EXPERTS, 5, 6))
        dense = draw(1, (3,)).requires_grad_()
        parameter = (experts if group is not None else distribute_tensor(experts, mesh, placements)).requires_grad_()
        base = torch.optim.AdamW([dense, parameter], lr=1.0)
        optimizer = Mechanic(base, variant=variant, s_init=1e-2, process_group=group)
        runs.append([])
        for step in range(STEPS):
            noise = draw(step + 5, (EXPERTS, 5, 6))
            noise = distribute_tensor(noise, mesh, placements) if group is None else noise
            dense.grad, parameter.grad = dense.detach() - 1.0, parameter.detach() - 1.0 + 0.3 * noise
            optimizer.step()
            runs[-1].append(float(optimizer.scale))
        optimizer.check_consistency()
    assert runs[1] == pytest.approx(runs[0], rel=1e-9)


@ranks(4)
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_declared_experts_of_fsdp1(use_orig_params: bool) -> None:
    """The dense layer is sharded over two ranks, with a replica on the others; each pair of them has an expert."""
    mesh = mesh_2d()
    group, alone_ = mesh["dp"].get_group(), alone()

    def layer(seed: int) -> nn.Linear:
        torch.manual_seed(seed)
        return nn.Linear(5, 3).double()

    def wrapped(module: nn.Module) -> nn.Module:
        device = torch.device("cpu")
        return FullyShardedDataParallel(module, process_group=group, use_orig_params=use_orig_params, device_id=device)

    whole = [layer(seed) for seed in range(3)]
    dense, expert = wrapped(layer(0)), wrapped(layer(1 + mesh["ep"].get_local_rank()))
    declared = {"params": list(expert.parameters()), "expert_parallel": True}
    groups: list[dict[str, Any]] = [{"params": list(dense.parameters())}, declared]
    runs = [
        Mechanic(torch.optim.SGD([p for each in whole for p in each.parameters()], lr=1.0), process_group=alone_),
        Mechanic(torch.optim.SGD(groups, lr=1.0)),
    ]
    for _ in range(5):
        for optimizer in runs:
            for each in optimizer.param_groups:
                for p in each["params"]:
                    p.grad = p.detach().square() - 1.0
            optimizer.step()
        assert float(runs[1].scale) == pytest.approx(float(runs[0].scale), rel=1e-9)
    runs[1].check_consistency()


@ranks(4)
@pytest.mark.parametrize("place", [two_meshes, plain, plain_twice])
@pytest.mark.parametrize(("start", "words"), [
    ("random", "differs"), ("alike", "has another gradient"), ("zero", "has another gradient"),
])  # fmt: skip
def test_undeclared_experts_are_refused(place: Callable[..., Tensor | None], start: str, words: str) -> None:
    problem = Problem(place, start)
    optimizer = make(problem, "optax")
    problem.give_gradients(0)
    with pytest.raises(ValueError, match=rf'parameter 0 of group 1.* {words} .*"expert_parallel": True') as caught:
        optimizer.step()
    messages: list[Any] = [None] * 4
    dist.all_gather_object(messages, str(caught.value))
    assert len(set(messages)) == 1
    assert not optimizer.state


@ranks(4)
def test_copies_that_cannot_be_counted_are_refused() -> None:
    problem = Problem(plain_twice, "zero")
    optimizer = make(problem, "optax", expert_parallel=True)
    problem.give_gradients(0)
    for expert, _, parameter in problem.held:
        if expert is not None:
            parameter.grad = None
    with pytest.raises(ValueError, match=r"cannot count by its values .* parameter 0 of group 1"):
        optimizer.step()


@ranks(4)
@pytest.mark.parametrize("place", [two_meshes, plain_twice])
def test_a_check_finds_an_expert_or_a_dense_copy_that_drifts(place: Callable[..., Tensor | None]) -> None:
    for group in (0, 1):
        problem = Problem(place)
        optimizer = make(problem, "optax", expert_parallel=True)
        scales(problem, optimizer, range(3))
        optimizer.check_consistency()
        if dist.get_rank() == 3:
            with torch.no_grad():
                local(optimizer.param_groups[group]["params"][0]).view(-1)[0] += 1e-12
        if (place, group) == (two_meshes, 1):  # of each shard of an expert there is one
            with pytest.raises(RuntimeError, match="not x_ref"):
                optimizer.check_consistency()
        else:
            with pytest.raises(RuntimeError, match=f"drifted apart: the value of parameter 0 of group {group}"):
                optimizer.check_consistency()


@ranks(4)
@pytest.mark.parametrize("declares_in_checkpoint", [True, False])
def test_counts_again_after_a_load_and_on_other_ranks(declares_in_checkpoint: bool) -> None:
    """Saved on four ranks, with two copies of each expert, and continued on two, with one copy."""
    rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    whole = Problem(plain_twice)
    optimizer = make(whole, "multiplicative", expert_parallel=True)
    scales(whole, optimizer, range(8))
    saved = copy.deepcopy((optimizer.state_dict(), [p.detach() for _, _, p in whole.held]))
    if not declares_in_checkpoint:
        for each in saved[0]["param_groups"]:
            each.pop("expert_parallel", None)
    expected = scales(whole, optimizer, range(8, STEPS))
    for group in (None, rows[dist.get_rank() // 2]):
        problem = Problem(plain_twice)
        again = make(problem, "multiplicative", group, expert_parallel=True)
        state, values = copy.deepcopy(saved)
        with torch.no_grad():
            for (_, _, parameter), value in zip(problem.held, values):
                parameter.copy_(value)
        again.load_state_dict(state)
        assert again.param_groups[1]["expert_parallel"] is True
        assert scales(problem, again, range(8, STEPS)) == pytest.approx(expected, rel=1e-9)
        again.check_consistency()


class Model(nn.Module):
    """What a rank holds, each expert under its own name."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        for expert, name, parameter in problem.held:
            self.register_parameter(f"{name}_of_{expert}", nn.Parameter(parameter))
        problem.held = [(e, name, self.get_parameter(f"{name}_of_{e}")) for e, name, _ in problem.held]


def train_from_checkpoints(folder: str, place: str, load: bool) -> list[float]:
    """Eight steps and a save, or a load; then eight more steps."""
    problem = Problem(PLACES[place], drops_tokens=True)
    model = Model(problem)
    declares: dict[str, Any] = {} if place == "one process" else {"expert_parallel": True}
    optimizer = make(problem, "multiplicative", **declares)
    checkpointer = Checkpointer(folder, model, optimizer)
    if load:
        checkpointer.load()
    else:
        scales(problem, optimizer, range(8))
        checkpointer.save(8)
    found = scales(problem, optimizer, range(8, 16))
    optimizer.check_consistency()
    return found


PLACES = {"one process": on_one_process, "two meshes": two_meshes, "plain": plain, "plain twice": plain_twice}


@pytest.mark.parametrize(("saved", "loaded"), [
    ("two meshes", "plain twice"), ("plain twice", "two meshes"), ("plain", "one process"), ("one process", "plain"),
])  # fmt: skip
def test_checkpoints_reshard(saved: str, loaded: str, tmp_path: Path) -> None:
    world_size = {place: 1 if place == "one process" else 4 for place in PLACES}
    (expected, *_) = run(train_from_checkpoints, world_size[saved], str(tmp_path), saved, False)
    for found in run(train_from_checkpoints, world_size[loaded], str(tmp_path), loaded, True):
        assert found == pytest.approx(expected, rel=1e-9)


@ranks(4)
def test_a_copy_of_the_optimizer_counts_for_itself() -> None:
    problem = Problem(plain_twice)
    optimizer = make(problem, "optax", expert_parallel=True)
    scales(problem, optimizer, range(2))
    other = copy.deepcopy(optimizer)
    for each, twin in zip(optimizer.param_groups, other.param_groups):
        for parameter, its_twin in zip(each["params"], twin["params"]):
            its_twin.grad = parameter.grad.clone()
    other.step()
    optimizer.step()
    assert float(other.scale) == float(optimizer.scale)
    assert isinstance(other.metrics()["grad_norm"], Tensor)
    assert float(other.metrics()["grad_norm"]) == float(optimizer.metrics()["grad_norm"])


@ranks(4)
def test_tensor_parallel_copies_need_no_declaration() -> None:
    """A norm weight of ones on the data-parallel mesh alone: equal gradients confirm its copies."""
    weight = distribute_tensor(torch.ones(6, dtype=torch.float64), mesh_2d()["dp"], [Shard(0)]).requires_grad_()
    optimizer = Mechanic(torch.optim.SGD([weight], lr=1.0), variant="optax")
    weight.grad = distribute_tensor(draw(0, (6,)), mesh_2d()["dp"], [Shard(0)])
    assert isinstance(weight.grad, DTensor)
    optimizer.step()
    assert float(optimizer.metrics()["param_norm"]) == pytest.approx(6**0.5)
