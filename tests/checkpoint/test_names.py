"""A save is refused on all ranks if a name has several values, or a parameter of an optimizer has no name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from manic import Mechanic
from manic.checkpoint import Checkpointer
from manic.testing import ranks


def adamw(groups: Any) -> Optimizer:
    return torch.optim.AdamW(groups, lr=0.01)


def optax(groups: Any) -> Optimizer:
    return Mechanic(adamw(groups), variant="optax", s_init=1e-3)


def multiplicative(groups: Any) -> Optimizer:
    return Mechanic(adamw(groups))


def experts(layout: str, is_alike: bool) -> nn.Module:
    """A dense layer, and an expert of each rank of "ep" under one name."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    model = nn.ModuleDict()
    for name in ("dense", "expert"):
        torch.manual_seed(0 if name == "dense" or is_alike else 1 + mesh["ep"].get_local_rank())
        model[name] = nn.Linear(4, 4, bias=False).double()
        if layout == "fsdp2":
            fully_shard(model[name], mesh=mesh["dp"])
        elif layout == "fsdp1":
            group, device = mesh["dp"].get_group(), torch.device("cpu")
            model[name] = FullyShardedDataParallel(model[name], group, use_orig_params=True, device_id=device)
    return model


def step(model: nn.Module, optimizer: Optimizer) -> None:
    """The gradients of experts differ even if their values do not."""
    for name, parameter in model.named_parameters():
        factor = 1.0 if "dense" in name else 1.0 + dist.get_rank() % 2
        parameter.grad = parameter.detach() * factor
    optimizer.step()


def assert_refused(action: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        action()
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, str(caught.value))
    assert len(set(messages)) == 1


@ranks(4)
@pytest.mark.parametrize(("layout", "make", "is_declared", "is_alike"), [
    ("plain", adamw, True, False), ("plain", optax, True, False), ("plain", multiplicative, True, True),
    ("fsdp2", adamw, False, False), ("fsdp2", optax, True, True), ("fsdp2", multiplicative, True, False),
    ("fsdp1", adamw, False, False),
])  # fmt: skip
def test_experts_of_one_name_are_refused(
    layout: str, make: Callable[[Any], Optimizer], is_declared: bool, is_alike: bool, tmp_path: Path
) -> None:
    model = experts(layout, is_alike)
    declaration = {"expert_parallel": True} if is_declared else {}
    groups = [{"params": list(model["dense"].parameters())}, {"params": list(model["expert"].parameters())}]
    optimizer = make([groups[0], {**groups[1], **declaration}])
    step(model, optimizer)
    what = "expert.weight has other .* on rank 0 and rank 1, and a checkpoint has one entry of each name"
    for save in (Checkpointer(tmp_path, model, optimizer).save, Checkpointer(tmp_path, model, optimizer).async_save):
        assert_refused(lambda save=save: save(1), what)  # type: ignore[misc]
    assert not list(tmp_path.iterdir())


@ranks(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replicas_and_experts_with_names_of_their_own_are_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    """Replicas outside of their mesh, as of norm weights in TP with FSDP2, may differ in their last bits."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def sharded(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return distribute_tensor(torch.randn(4000).to(dtype), mesh["dp"], [Shard(0)])

    model = nn.Module()
    model.norm = nn.Parameter(sharded(0))
    if (rank := dist.get_rank()) != 3:  # one rank has no expert
        model.register_parameter(f"expert_{rank % 2}", nn.Parameter(torch.full((3,), 1.0 + rank % 2)))
    with torch.no_grad():
        last_bits = 1 + torch.finfo(dtype).eps * torch.rand(2000, generator=torch.Generator().manual_seed(rank)).sign()
        norm = model.norm
        assert isinstance(norm, DTensor)
        norm.to_local().mul_(last_bits.to(dtype) if mesh["tp"].get_local_rank() else 1.0)
    declared = [p for name, p in model.named_parameters() if name != "norm"]
    optimizer = adamw([{"params": [model.norm]}, {"params": declared, "expert_parallel": True}])
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    assert Checkpointer(tmp_path, model, optimizer).save(1) == str(tmp_path / "step_00000001")


@ranks(2)
@pytest.mark.parametrize("on_ranks", [(1,), (0, 1)])
def test_a_parameter_that_is_not_in_the_model_is_refused(on_ranks: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    Checkpointer(tmp_path, model, adamw(model.parameters())).save(1)
    before = model.weight.detach().clone()
    others = [nn.Parameter(torch.ones(7))] if dist.get_rank() in on_ranks else []
    checkpointer = Checkpointer(tmp_path, model, adamw([*model.parameters(), *others]))
    for action in (checkpointer.load, lambda: checkpointer.save(2)):
        assert_refused(action, r"a parameter of shape \(7,\) of the optimizer is not in the model: build")
    assert torch.equal(model.weight, before)
    assert checkpointer.steps() == [1]
