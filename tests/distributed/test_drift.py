"""check_consistency names the first rank and parameter that drifted, and passes without drift."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from manic import Mechanic
from manic.distributed.layout import local
from manic.testing import ranks, run
from support.failing import FailsAt
from support.fault_cases import LAYOUTS
from support.layouts import Setup, setup
from support.snapshots import differing, everyone, everything, take_steps
from support.tuners import rows_of, state_of

# Layouts with replicas, and the ranks that hold the replicas of a parameter.
REPLICAS = {
    ("ddp", 2): [0, 1], ("ddp", 3): [0, 1, 2], ("hsdp", 4): [0, 2], ("tp", 2): [0, 1], ("tp+fsdp2", 4): [0, 1],
    ("fsdp1-hybrid", 4): [0, 2],
}  # fmt: skip


def shared_parameter(layout: str, mechanic: Mechanic) -> Tensor:
    """A parameter that has replicas."""
    parameters = mechanic.param_groups[0]["params"]
    for number, parameter in enumerate(parameters):
        is_matrix_of_tp = layout in ("tp", "tp+fsdp2") and number < 3  # up.weight, up.bias and down.weight are split
        if parameter.requires_grad and not is_matrix_of_tp and local(parameter.detach()).numel():
            return parameter
    raise AssertionError("none")


def check_layout(layout: str) -> None:
    prepared = setup(layout, "adamw", torch.float64, s_init=1e-3)
    prepared.mechanic.check_consistency()  # also before the first step
    take_steps(prepared, 0, 3)
    before = everything(prepared)
    prepared.mechanic.check_consistency()
    assert differing(before, everything(prepared)) == []
    take_steps(prepared, 3, 2)
    prepared.mechanic.check_consistency()


@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS)
def test_no_drift_in_an_undisturbed_run(layout: str, world_size: int) -> None:
    run(check_layout, world_size, layout)


def drift(layout: str, holders: list[int], what: str) -> None:
    rank = dist.get_rank()
    prepared: Setup = setup(layout, "adamw", torch.float64, s_init=1e-3)
    take_steps(prepared, 0, 3)
    mechanic = prepared.mechanic
    parameter = shared_parameter(layout, mechanic)
    odd = holders[-1]
    if rank == odd:
        with torch.no_grad():
            tensor = {
                "the value": parameter, "x_ref": mechanic.state[parameter]["mechanic_x_ref"],
                "Delta": mechanic.state[parameter]["mechanic_delta"],
            }[what]  # fmt: skip
            flat = local(tensor.detach()).view(-1)
            flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0, dtype=flat.dtype))  # one bit
    with pytest.raises(RuntimeError, match="ranks have drifted apart") as caught:
        mechanic.check_consistency()
    message = str(caught.value)
    assert len(set(everyone(message))) == 1
    pattern = rf"{what} of parameter \d+ of group 0, shape .* on rank (\d) differs from rank (\d)"
    found = re.search(pattern, message)
    assert found, message
    if len(holders) > 2:
        assert int(found[1]) == odd
    else:  # of two replicas, either may be the wrong one
        assert {int(found[1]), int(found[2])} == set(holders), message


@pytest.mark.parametrize("what", ["the value", "x_ref", "Delta"])
@pytest.mark.parametrize(("layout", "world_size"), REPLICAS)
def test_detects_one_flipped_bit_on_one_rank(layout: str, world_size: int, what: str) -> None:
    run(drift, world_size, layout, REPLICAS[layout, world_size], what)


def two_parameters() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(3, 4).requires_grad_(), torch.randn(5).requires_grad_()]


def step_on_ones(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@ranks(3)
@pytest.mark.parametrize("what", ["tuner", "lr"])
def test_detects_a_different_tuner_or_setting(what: str) -> None:
    optimizer = Mechanic(torch.optim.SGD(two_parameters(), lr=1.0), variant="optax")
    step_on_ones(optimizer)
    if dist.get_rank() == 1:
        if what == "tuner":
            rows_of(state_of(optimizer))["s"] *= 1 + 1e-15
        else:
            optimizer.param_groups[0]["lr"] = 0.5
    words = "the tuner of rank 1 differs from rank 0: S is" if what == "tuner" else "the settings of rank 1 differ from"
    with pytest.raises(RuntimeError, match=words):
        optimizer.check_consistency()


@ranks(2)
def test_checks_every_n_steps() -> None:
    optimizer = Mechanic(torch.optim.SGD(two_parameters(), lr=1.0), check_every=3, variant="optax")
    step_on_ones(optimizer)
    with torch.no_grad():
        optimizer.state[optimizer.param_groups[0]["params"][1]]["mechanic_x_ref"][4] += float(dist.get_rank())
    step_on_ones(optimizer)
    step_on_ones(optimizer)
    with pytest.raises(RuntimeError, match="of parameter 1 of group 0, shape \\(5,\\) on rank"):
        step_on_ones(optimizer)


@ranks(2)
@pytest.mark.parametrize("variant", ["optax", "pytorch"])
def test_ranks_check_together_after_a_failed_step(variant: str) -> None:
    """Failed steps count too, so that no rank checks while another steps."""
    base = torch.optim.SGD(two_parameters(), lr=1.0)
    optimizer = Mechanic(base, check_every=2, variant=variant, s_init=0.1)
    step_on_ones(optimizer)
    step = base.step

    def step_and_fail() -> None:
        step()
        raise OSError("out of luck")

    if dist.get_rank() == 1 and variant == "pytorch":
        # The other rank waits for this rank's second sums, after the base step, so this rank fails while it writes x.
        with pytest.raises(OSError, match="out of luck"), FailsAt(1, OSError("out of luck"), "addcmul"):
            step_on_ones(optimizer)
    elif dist.get_rank() == 1:
        base.step = step_and_fail  # type: ignore[assignment, method-assign]
        with pytest.raises(OSError, match="out of luck"):
            step_on_ones(optimizer)
        base.step = step  # type: ignore[method-assign]
    else:
        step_on_ones(optimizer)
    with pytest.raises(RuntimeError, match="ranks have drifted apart: the tuner of rank"):
        step_on_ones(optimizer)


@ranks(2)
def test_a_check_changes_nothing() -> None:
    """Also for parameters that are frozen temporarily or were just added."""
    results = []
    for checks in (False, True):
        parameters = two_parameters()
        optimizer = Mechanic(torch.optim.SGD(parameters, lr=1.0), s_init=0.1, variant="optax")
        for step in range(6):
            parameters[1].requires_grad_(step not in (2, 3))
            if step == 4:
                added = torch.ones(2, requires_grad=True)
                optimizer.add_param_group({"params": [added]})
            if checks:
                optimizer.check_consistency()
            if step == 4:
                with torch.no_grad():
                    added.fill_(0.5)  # weights loaded after add_param_group
            for p in (*parameters, *([added] if step >= 4 else [])):
                p.grad = p.detach() + 1.0 if p.requires_grad else None
            optimizer.step()
        results.append((optimizer.scale, *(p.detach().clone() for p in (*parameters, added))))
    for a, b in zip(*results):
        assert torch.equal(a, b)


@ranks(2)
def test_an_edit_on_all_ranks_is_not_drift() -> None:
    optimizer = Mechanic(torch.optim.SGD(two_parameters(), lr=1.0), s_init=0.1, variant="optax")
    step_on_ones(optimizer)
    parameter = optimizer.param_groups[0]["params"][1]
    with torch.no_grad():
        parameter.clamp_(-0.1, 0.1)
    with pytest.raises(
        RuntimeError, match=r"1 of 2 parameters are not x_ref .* parameter 1 of group 0.*call rebase\(\)"
    ):
        optimizer.check_consistency()
    optimizer.rebase()
    optimizer.check_consistency()


@ranks(2)
def test_compares_only_ranks_of_the_group() -> None:
    """Two models with separate groups are not compared with each other."""
    groups = [dist.new_group([rank]) for rank in range(2)]
    rank = dist.get_rank()
    model = nn.Linear(2 + rank, 2)
    optimizer = Mechanic(
        torch.optim.SGD(model.parameters(), lr=1.0 + rank), process_group=groups[rank], variant="optax"
    )
    step_on_ones(optimizer)
    optimizer.check_consistency()
