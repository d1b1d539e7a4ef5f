"""Mismatched ranks raise the same error on every rank at the first step, and change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

from manic import Mechanic, mechanize
from manic.distributed.layout import Plain
from manic.testing import ranks
from manic.tuners.base import Learned, Sums, Tuner


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def assert_all_ranks_raise(optimizer: torch.optim.Optimizer, words: str) -> None:
    """Step; all ranks must raise the same error and leave the parameters unchanged."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in held]
    for p in held:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=words) as caught:
        optimizer.step()
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, str(caught.value))
    assert len(set(messages)) == 1
    for p, q in zip(held, before):
        assert torch.equal(p.detach(), q)


class Constant(Tuner):
    """Its options are attributes, of any name."""

    name = "constant"
    scales = "updates"
    sums = ("grad_square", "x_square")

    def __init__(self, size: float, kind: str = "plain") -> None:
        super().__init__()
        self._size, self.kind = size, kind

    def learn(self, state: Mapping[str, Tensor], sums: Sums) -> Learned:
        return Learned({"s": torch.full_like(state["s"], self._size)}, signal=sums["grad_square"])


@ranks(3)
@pytest.mark.parametrize("difference", ["number", "shape", "dtype", "frozen"])
def test_different_parameters(difference: str) -> None:
    odd = dist.get_rank() == 1
    mine = parameters((3, 4), (5,))
    if odd:
        mine = {
            "number": lambda: parameters((3, 4)),
            "shape": lambda: parameters((3, 4), (6,)),
            "dtype": lambda: parameters((3, 4), (5,), dtype=torch.float64),
            "frozen": lambda: [mine[0], mine[1].requires_grad_(False)],
        }[difference]()
    assert_all_ranks_raise(
        Mechanic(torch.optim.SGD(mine, lr=1.0), variant="optax"),
        "different param groups or parameters: rank . has .*; rank 1 has",
    )


@ranks(2)
@pytest.mark.parametrize("option", [
    {"s_init": 0.5}, {"betas": (0.9, 0.99)}, {"variant": "pytorch"}, {"store_delta": False}, {"plain": "sharded"},
    {"nonfinite": "skip"}, {"s_max": 2.0}, {"check_every": 3}, {"update": "snapshot"}, {"s_decay": 0.1}, {"eps": 1e-6},
], ids=str)  # fmt: skip
def test_different_settings(option: dict[str, Any]) -> None:
    options = option if dist.get_rank() == 1 else {}
    assert_all_ranks_raise(
        Mechanic(torch.optim.SGD(parameters((3,)), lr=1.0), **{"variant": "optax", **options}), "different settings"
    )


@ranks(2)
@pytest.mark.parametrize(("option", "words"), [({"size": 2.0}, "size=2.0"), ({"kind": "fancy"}, "kind=fancy")])
def test_different_settings_of_a_tuner_of_ones_own(option: dict[str, Any], words: str) -> None:
    tuner = Constant(**{"size": 1.0, **(option if dist.get_rank() == 1 else {})})
    assert_all_ranks_raise(
        Mechanic(torch.optim.SGD(parameters((3,)), lr=1.0), variant=tuner), f"different settings: .*{words}"
    )


@ranks(3)
@pytest.mark.parametrize("plain", ["replicated", "sharded"])
@pytest.mark.parametrize("difference", [
    {"lr": 0.5}, {"betas": (0.9, 0.95)}, {"weight_decay": 0.5}, {"lr": torch.tensor(0.5)}, {"amsgrad": True}, "groups",
], ids=str)  # fmt: skip
def test_different_hyperparameters(difference: dict[str, Any] | str, plain: Plain) -> None:
    first, second = parameters((3,), (4,))
    odd = dist.get_rank() == 2
    groups = [{"params": [first, second]}]
    if odd and difference == "groups":
        groups = [{"params": [first]}, {"params": [second]}]
    options = {"lr": 1.0, **(difference if odd and isinstance(difference, dict) else {})}
    optimizer = Mechanic(torch.optim.AdamW(groups, **options), plain=plain, variant="optax")
    assert_all_ranks_raise(optimizer, "different param groups or parameters: rank 0 has .*; rank 2 has")


@ranks(2)
def test_another_base_optimizer() -> None:
    cls = (torch.optim.Adam, torch.optim.AdamW)[dist.get_rank()]
    base = (
        cls(parameters((3,)), lr=1.0, weight_decay=0.1, decoupled_weight_decay=True)
        if cls is torch.optim.Adam
        else (cls(parameters((3,)), lr=1.0, weight_decay=0.1))
    )
    assert_all_ranks_raise(Mechanic(base, variant="optax"), "different settings")


@ranks(2)
@pytest.mark.parametrize("other", [2, 0])
def test_ranks_that_loaded_different_checkpoints(other: int) -> None:
    """Also if one rank found none, for example on an unshared disk."""
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    (source,) = parameters((3,))
    donor = Mechanic(torch.optim.SGD([source], lr=1.0), process_group=alone, s_init=0.1, variant="optax")
    for _ in range(4 if dist.get_rank() == 0 else other):
        source.grad = torch.ones(3)
        donor.step()
    target = source.detach().clone().requires_grad_()
    optimizer = Mechanic(torch.optim.SGD([target], lr=1.0), s_init=0.1, variant="optax")
    if dist.get_rank() == 0 or other:
        optimizer.load_state_dict(donor.state_dict())
    assert_all_ranks_raise(optimizer, "different settings: rank 1 has .*; rank 0 has .* goes on after 4 steps with")


@ranks(2)
def test_undeclared_sharded_plain_parameters() -> None:
    mine = [p * (1 + dist.get_rank()) for p in parameters((3, 4))]  # equal shapes, other values
    held = [p.detach().requires_grad_() for p in mine]
    assert_all_ranks_raise(
        Mechanic(torch.optim.SGD(held, lr=1.0), variant="optax"), 'is not replicated.*plain="sharded"'
    )


@ranks(2)
def test_zero_without_plain_sharded() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=mechanize(torch.optim.SGD, variant="optax"), lr=1.0
    )
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match='pass plain="sharded"'):
        optimizer.step()


@ranks(2)
def test_refuses_zero_inside_mechanic() -> None:
    optimizer = ZeroRedundancyOptimizer(parameters((3,), (4,)), optimizer_class=torch.optim.SGD, lr=1.0)
    with pytest.raises(TypeError, match="must be inside ZeroRedundancyOptimizer"):
        Mechanic(optimizer, variant="optax")


@ranks(4)
def test_refuses_undeclared_or_wrong_pipeline_stages() -> None:
    stage = dist.get_rank() // 2
    mine = parameters((3, 4 + stage))
    assert_all_ranks_raise(Mechanic(torch.optim.SGD(mine, lr=1.0), variant="optax"), "pass pipeline_stages")
    optimizer = Mechanic(torch.optim.SGD(parameters((3, 4 + stage)), lr=1.0), pipeline_stages=3, variant="optax")
    assert_all_ranks_raise(optimizer, "does not divide")
    fine = Mechanic(torch.optim.SGD(parameters((3, 4 + stage)), lr=1.0), pipeline_stages=2, variant="optax")
    fine.step()


@ranks(4)
def test_refuses_a_group_that_holds_part_of_the_model() -> None:
    mesh = init_device_mesh("cpu", (4,))
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = nn.Linear(8, 8)
    fully_shard(model, mesh=mesh)
    mine = halves[dist.get_rank() // 2]
    optimizer = Mechanic(torch.optim.SGD(model.parameters(), lr=1.0), process_group=mine, variant="optax")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="do not hold a parameter of shape"):
        optimizer.step()


@ranks(4)
def test_accepts_a_group_that_holds_one_replica() -> None:
    """HSDP with the sharding group alone: each replica sums separately, with equal results."""
    torch.manual_seed(0)
    model = nn.Linear(6, 6).double()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
    results = []
    for group in (None, mesh["shard"].get_group()):
        optimizer = Mechanic(torch.optim.SGD(model.parameters(), lr=0.0), process_group=group, variant="optax")
        for p in model.parameters():
            p.grad = p.detach().clone()
        optimizer.step()
        results.append({name: value.item() for name, value in optimizer.metrics().items()})
    assert results[0]["param_norm"] == pytest.approx(results[1]["param_norm"], rel=1e-12)
    assert results[0]["grad_norm"] == pytest.approx(results[1]["grad_norm"], rel=1e-12)


@ranks(2)
def test_refuses_fsdp1_parameters_with_constant_values() -> None:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    wrapped(torch.randn(2, 4)).sum().backward()
    optimizer = Mechanic(torch.optim.SGD(wrapped.parameters(), lr=1.0), variant="optax")
    with pytest.raises(ValueError, match="cannot infer from the values"):
        optimizer.step()
    declared = Mechanic(torch.optim.SGD(wrapped.parameters(), lr=1.0), plain="sharded", variant="optax")
    declared.step()


@ranks(2)
def test_compares_added_parameters() -> None:
    optimizer = Mechanic(torch.optim.SGD(parameters((3,)), lr=1.0), variant="optax")
    optimizer.step()
    optimizer.add_param_group({"params": parameters((2, 2))})
    optimizer.step()
    optimizer.add_param_group({"params": parameters((2, 2 + dist.get_rank()))})
    assert_all_ranks_raise(optimizer, "different param groups or parameters")


@ranks(2)
def test_ranks_without_parameters_of_an_added_zero_group_compare_it() -> None:
    model = nn.Linear(8, 8)
    cls = mechanize(torch.optim.SGD, plain="sharded", variant="optax")
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=cls, lr=1.0)
    extra = nn.Parameter(torch.ones(3))
    for step in range(3):
        for p in (*model.parameters(), extra):
            p.grad = torch.ones_like(p)
        if step == 1:
            optimizer.add_param_group({"params": [extra]})
        optimizer.step()


@ranks(2)
def test_refuses_a_rank_outside_the_group() -> None:
    group = dist.new_group([0])
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match="not in process_group"):
            Mechanic(torch.optim.SGD(parameters((3,)), lr=1.0), process_group=group, variant="optax")
    else:
        Mechanic(torch.optim.SGD(parameters((3,)), lr=1.0), process_group=group, variant="optax")


@ranks(2)
def test_an_unusable_gradient_on_one_rank_raises_on_every_rank() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(5, 3, sparse=dist.get_rank() == 1)
    optimizer = Mechanic(torch.optim.SGD(embedding.parameters(), lr=1.0), variant="optax")
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"rank 1: .* has a sparse gradient"):
        optimizer.step()
    assert not optimizer.state


@ranks(4)
def test_refuses_stages_with_equal_parameters() -> None:
    optimizer = Mechanic(torch.optim.SGD(parameters((3, 4)), lr=1.0), pipeline_stages=2, variant="optax")
    assert_all_ranks_raise(optimizer, "stages must hold different parameters")


@ranks(2)
def test_reduces_a_partial_gradient_first() -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = init_device_mesh("cpu", (2,))
    parameter = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Replicate()]))
    parameter.grad = DTensor.from_local(torch.full((3,), 1.0 + dist.get_rank()), mesh, [Partial()])
    optimizer = Mechanic(torch.optim.SGD([parameter], lr=1.0), variant="optax")
    optimizer.step()
    assert optimizer.metrics()["grad_norm"].item() == pytest.approx(3.0 * 3**0.5)
