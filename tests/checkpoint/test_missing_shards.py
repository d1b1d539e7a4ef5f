"""Shards that some ranks lack in their state: completed or refused at a save, and refused where none covers them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from manic.checkpoint import Checkpointer
from manic.distributed.layout import local
from manic.testing import run
from support.saved import MAKES, Make, assert_equal, multiplicative, net, shards, shared_folder, train


class Experts(nn.Module):
    """Rows are experts; each rank has two."""

    experts: nn.Parameter
    router: nn.Parameter

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.mesh = init_device_mesh("cpu", (2,))
        for name in ("experts", "router"):
            weight = distribute_tensor(torch.randn(4, 3, dtype=torch.float64), self.mesh, [Shard(0)])
            setattr(self, name, nn.Parameter(weight))

    def step(self, optimizer: Optimizer, all_have_tokens: bool) -> None:
        for parameter in (self.experts, self.router):
            has_tokens = parameter is self.router or all_have_tokens or dist.get_rank() == 0
            gradient = DTensor.from_local(local(parameter).detach().clone(), self.mesh, [Shard(0)])
            parameter.grad = gradient if has_tokens else None
        optimizer.step()


def resume_experts(make: Make, is_late: bool) -> None:
    model = Experts(0)
    optimizer = make(model.parameters())
    for _ in range(3):
        model.step(optimizer, all_have_tokens=False)
    with torch.no_grad():
        x = local(model.experts).clone()
    assert (model.experts in optimizer.state) == (dist.get_rank() == 0)
    checkpointer = Checkpointer(shared_folder(), model, optimizer)
    checkpointer.save(3)
    assert (model.experts in optimizer.state) == (dist.get_rank() == 0), "a save changed the optimizer"

    other = Experts(1)
    resumed = make(other.parameters())
    if is_late:
        other.step(resumed, all_have_tokens=False)
    Checkpointer(checkpointer.directory, other, resumed).load()
    state = resumed.state[other.experts]
    with torch.no_grad():
        assert torch.equal(local(other.experts), x)
        assert state["step"] == 3
        if dist.get_rank() == 0:
            for key, value in optimizer.state[model.experts].items():
                assert torch.equal(local(state[key]), local(value)), key
        else:
            assert not local(state["exp_avg"]).any()
            own = [value for key, value in state.items() if key.startswith("mechanic_x_ref")]
            assert len(own) == {"adamw": 0, "optax": 1, "multiplicative": 2, "horizons": 3}[make.__name__]
            assert all(torch.equal(local(reference), x) for reference in own)
    other.step(resumed, all_have_tokens=True)


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("make", MAKES)
def test_a_shard_that_never_had_a_gradient_is_saved_and_loaded(make: Make, is_late: bool) -> None:
    run(resume_experts, 2, make, is_late)


def save_by_torch(directory: str) -> None:
    model = Experts(0)
    optimizer = multiplicative(model.parameters())
    model.step(optimizer, all_have_tokens=False)
    for parameter in model.parameters():
        parameter.grad = None
    state = get_optimizer_state_dict(model, optimizer)
    with pytest.raises(CheckpointException, match=r"state\.experts\.exp_avg"):
        dcp.save({"optimizer": state}, checkpoint_id=directory)


def test_torchs_functions_refuse_to_save_a_missing_shard(tmp_path: Path) -> None:
    """Also fails if torch begins to save a part of a tensor: Mechanic would have to notice at the load."""
    run(save_by_torch, 2, str(tmp_path))


def test_refuses_a_checkpoint_that_does_not_cover_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch refuses to write one; a damaged or foreign index may still say so."""
    from manic.checkpoint import checkpointer, transfer

    model = net(0)
    optimizer = multiplicative(model.parameters())
    train(model, optimizer, range(2))
    Checkpointer(tmp_path, model, optimizer).save(2)
    read_index = transfer.read_index

    def without_chunks(*arguments: Any) -> Any:
        index = dict(read_index(*arguments))
        index["optimizer.state.0.weight.mechanic_x_ref"].chunks.clear()
        return index

    monkeypatch.setattr(checkpointer, "read_index", without_chunks)
    before = shards(model)
    with pytest.raises(ValueError, match=r"holds 0 of the 96 elements of optimizer\.state\.0\.weight\.mechanic_x_ref"):
        Checkpointer(tmp_path, model, optimizer).load()
    assert_equal(model, before)
