"""What a checkpoint holds is loaded or refused by name, whatever the live optimizer has: frozen, new or lost state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from manic import Mechanic, mechanize
from manic.checkpoint import Checkpointer
from manic.testing import run
from support.saved import MAKES, Make, adamw, assert_equal, multiplicative, net, shards, shared_folder, train


def freeze(model: nn.Module, frozen: bool) -> None:
    model.get_submodule("0").requires_grad_(not frozen)


def freeze_and_thaw(make: Make, layout: str, at_load: str) -> None:
    """Frozen from step 4 to 10; saved and loaded at 7, into an optimizer of which the layer ``at_load``."""
    model = net(0, layout)
    optimizer = make(model.parameters())
    train(model, optimizer, range(4))
    freeze(model, True)
    train(model, optimizer, range(4, 7))
    checkpointer = Checkpointer(shared_folder(), model, optimizer)
    checkpointer.save(7)

    def go_on(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
        freeze(model, True)
        train(model, optimizer, range(7, 10))
        freeze(model, False)
        train(model, optimizer, range(10, 13))
        return shards(model)

    expected = go_on(model, optimizer)
    other = model if at_load == "was rolled back" else net(1, layout)
    freeze(other, at_load != "is trained")
    resumed = optimizer if at_load == "was rolled back" else make(other.parameters())
    if at_load == "was never trained":
        train(other, resumed, range(2))
    Checkpointer(checkpointer.directory, other, resumed).load()
    assert next(other.parameters()).requires_grad == (at_load == "is trained")
    go_on(other, resumed)
    assert_equal(other, expected)


@pytest.mark.parametrize("at_load", ["is frozen", "is trained", "was never trained", "was rolled back"])
@pytest.mark.parametrize("make", MAKES)
def test_a_frozen_layer_keeps_its_state(make: Make, at_load: str) -> None:
    freeze_and_thaw(make, "plain", at_load)


@pytest.mark.parametrize(("layout", "at_load"), [
    ("fsdp2", "is frozen"), ("fsdp2", "was never trained"), ("fsdp2", "was rolled back"),
    ("fsdp1-orig", "is frozen"), ("fsdp1-flat", "is frozen"),
])  # fmt: skip
@pytest.mark.parametrize("make", [adamw, multiplicative])
def test_a_frozen_layer_keeps_its_state_on_two_ranks(make: Make, layout: str, at_load: str) -> None:
    run(freeze_and_thaw, 2, make, layout, at_load)


def refuse_without_changes(make: Make, layout: str) -> None:
    model = net(0, layout)
    optimizer = make(model.parameters())
    train(model, optimizer, range(3))
    checkpointer = Checkpointer(shared_folder(), model, optimizer)
    checkpointer.save(3)
    other = net(1, layout)
    freeze(other, True)
    resumed = make(other.parameters())
    train(other, resumed, range(1))
    before = shards(other)
    with pytest.raises(ValueError, match=r"holds exp_avg of 0\.\w+, of shape .* how it is sharded is not known"):
        Checkpointer(checkpointer.directory, other, resumed).load()
    assert not next(other.parameters()).requires_grad
    assert_equal(other, before)


def test_refuses_state_whose_layout_is_not_known() -> None:
    run(refuse_without_changes, 2, multiplicative, "fsdp1-orig")


@pytest.mark.parametrize("first_load", ["of before the first step", "of the same step"])
@pytest.mark.parametrize("make", MAKES)
def test_rolls_back_over_a_load_that_had_no_state(make: Make, first_load: str, tmp_path: Path) -> None:
    model = net(0)
    optimizer = make(model.parameters())
    checkpointer = Checkpointer(tmp_path, model, optimizer)
    checkpointer.save(0)
    train(model, optimizer, range(5))
    checkpointer.save(5)
    train(model, optimizer, range(5, 9))
    expected = shards(model)
    freeze(model, True)
    checkpointer.load(0 if "first" in first_load else 5)
    checkpointer.load(5)
    freeze(model, False)
    train(model, optimizer, range(5, 9))
    assert_equal(model, expected)


def with_a_later_group(make: Make, seed: int) -> tuple[nn.Module, Optimizer]:
    model = net(seed)
    freeze(model, True)
    return model, make(model[2].parameters())


def add_group(model: nn.Module, optimizer: Optimizer) -> None:
    freeze(model, False)
    optimizer.add_param_group({"params": list(model.get_submodule("0").parameters()), "lr": 0.1})


@pytest.mark.parametrize("make", MAKES)
def test_refuses_state_of_a_group_that_is_not_there_yet(make: Make, tmp_path: Path) -> None:
    model, optimizer = with_a_later_group(make, 0)
    train(model, optimizer, range(3))
    add_group(model, optimizer)
    train(model, optimizer, range(3, 6))
    Checkpointer(tmp_path, model, optimizer).save(6)
    train(model, optimizer, range(6, 9))

    other, resumed = with_a_later_group(make, 1)
    train(other, resumed, range(1))
    before = shards(other)
    with pytest.raises(ValueError, match=r"has \w+ for 0\.\w+, which is in no param group of this run: add its group"):
        Checkpointer(tmp_path, other, resumed).load()
    assert_equal(other, before)
    add_group(other, resumed)
    Checkpointer(tmp_path, other, resumed).load()
    train(other, resumed, range(6, 9))
    assert_equal(other, shards(model))


def test_another_optimizer_may_lack_mechanics_state_of_a_missing_group(tmp_path: Path) -> None:
    model = net(0)
    optimizer = Mechanic(torch.optim.SGD(model.parameters(), lr=1.0))
    train(model, optimizer, range(3))
    Checkpointer(tmp_path, model, optimizer).save(3)
    other = net(1)
    Checkpointer(tmp_path, other, torch.optim.SGD(other[2].parameters(), lr=1.0)).load()
    assert_equal(other, shards(model))


def test_refuses_moments_for_an_optimizer_that_has_none(tmp_path: Path) -> None:
    model = net(0)
    optimizer = adamw(model.parameters())
    train(model, optimizer, range(2))
    Checkpointer(tmp_path, model, optimizer).save(2)
    other = net(1)
    for resumed in (torch.optim.SGD(other.parameters()), Mechanic(torch.optim.SGD(other.parameters()))):
        with pytest.raises(ValueError, match="of another optimizer or other options: it has step for"):
            Checkpointer(tmp_path, other, resumed).load()


@pytest.mark.parametrize("make", MAKES)
def test_a_group_takes_its_settings_from_a_parameter_that_was_saved(make: Make, tmp_path: Path) -> None:
    """The first of the group is new, so that the checkpoint has no settings of it; another group is empty."""
    model, optimizer = with_a_later_group(make, 0)
    optimizer.param_groups[0]["lr"] = 0.125
    train(model, optimizer, range(3))
    Checkpointer(tmp_path, model, optimizer).save(3)
    train(model, optimizer, range(3, 5))
    other = net(1)
    freeze(other, True)
    resumed = make([{"params": [], "lr": 0.0625}, {"params": list(other.parameters())}])
    Checkpointer(tmp_path, other, resumed).load()
    assert [group["lr"] for group in resumed.param_groups] == [0.0625, 0.125]
    train(other, resumed, range(3, 5))
    assert_equal(other, shards(model))


def a_group_is_missing_on_one_rank(directory: str) -> None:
    """Each rank has one stage of a pipeline; the second rank lacks a group of the saved run."""
    rank = dist.get_rank()

    def new(is_complete: bool) -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(rank)
        stage = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model = nn.ModuleDict({f"stage{rank}": stage})
        bias = [p for name, p in stage.named_parameters() if name.endswith("bias")]
        groups = [
            [p for name, p in stage.named_parameters() if name.endswith("weight")],
            *([bias] if is_complete else []),
        ]
        return model, adamw([{"params": group} for group in groups])

    def step(model: nn.Module, optimizer: Optimizer) -> None:
        model[f"stage{rank}"](torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = new(True)
    step(model, optimizer)
    Checkpointer(directory, model, optimizer).save(1)
    other, resumed = new(is_complete=rank == 0)
    with pytest.raises(ValueError, match=r"has \w+ for stage1\.0\.bias, which is in no param group of this run"):
        Checkpointer(directory, other, resumed).load()
    assert rank or not resumed.state[next(other.parameters())]["exp_avg"].any()
    other, resumed = new(True)
    next(other.parameters()).requires_grad_(False)
    Checkpointer(directory, other, resumed).load()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(resumed.state[q][key], value), key


def test_a_group_that_is_missing_on_one_rank_is_refused_on_all(tmp_path: Path) -> None:
    run(a_group_is_missing_on_one_rank, 2, str(tmp_path))


def zero_keeps_frozen_state(directory: str) -> None:
    def new(seed: int) -> tuple[nn.Module, Any]:
        model = DistributedDataParallel(net(seed))
        make = mechanize(torch.optim.AdamW, plain="sharded")
        return model, ZeroRedundancyOptimizer(model.parameters(), optimizer_class=make, lr=1.0)

    model, optimizer = new(0)
    train(model, optimizer, range(3))
    Checkpointer(directory, model, optimizer).save(3)
    other, resumed = new(1)
    other.requires_grad_(False)
    Checkpointer(directory, other, resumed).load()
    for mine, theirs in zip(optimizer.optim.param_groups, resumed.optim.param_groups, strict=True):
        for p, q in zip(mine["params"], theirs["params"], strict=True):
            for key, value in optimizer.optim.state[p].items():
                assert torch.equal(resumed.optim.state[q][key], value), key


def test_zero_keeps_the_state_of_frozen_parameters(tmp_path: Path) -> None:
    run(zero_keeps_frozen_state, 2, str(tmp_path))


def load_into_stages_of_other_classes(directory: str) -> None:
    """Each stage of a pipeline has a parameter, the first one's optimizer no state in the run that loads."""
    rank = dist.get_rank()

    def make(*kinds: Any) -> tuple[nn.Module, Checkpointer]:
        model = nn.ParameterDict({f"w{rank}": torch.full((3,), 1.0 + rank)})
        optimizer = kinds[rank](model.parameters(), lr=0.01)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return model, Checkpointer(directory, model, optimizer)

    make(torch.optim.AdamW, torch.optim.AdamW)[1].save(1)
    model, other = make(torch.optim.SGD, torch.optim.AdamW)
    before = shards(model)
    with pytest.raises(ValueError, match=r"of another optimizer or other options: it has \w+ for w0"):
        other.load()
    assert_equal(model, before)


def test_refuses_state_that_the_optimizer_of_this_stage_does_not_keep(tmp_path: Path) -> None:
    run(load_into_stages_of_other_classes, 2, str(tmp_path))
