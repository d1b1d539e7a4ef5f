"""nonfinite="skip" over torch's fused optimizers: the device leaves the step out, and the host never waits for it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from manic import Mechanic, NonfiniteError
from manic.step.deferral import Deferral
from manic.testing import run
from manic.tuners.multiplicative import Multiplicative
from support.problems import problem

FUSED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1.0, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, nesterov=True, weight_decay=0.1, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1.0, amsgrad=True, weight_decay=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1.0, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1.0, lr_decay=0.01, fused=True),
}
# The host asks for numbers in the first 16 steps.
FIRST, STEPS = 20, 40


class Resting(Multiplicative):
    """The tuner, with rests that a test reaches."""

    name = "resting"
    rests = (24, 3)


class Asked(TorchDispatchMode):
    """Counts the numbers that the host asks a tensor for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Without those of a step before, which a device has copied to the host by then."""
    mode, tolist, read = Asked(), Tensor.tolist, Deferral.read

    def counted(tensor: Tensor) -> Any:
        mode.count += 1
        return tolist(tensor)

    def uncounted(deferral: Deferral) -> Any:
        count, result = mode.count, read(deferral)
        mode.count = count
        return result

    monkeypatch.setattr(Tensor, "tolist", counted)
    monkeypatch.setattr(Deferral, "read", uncounted)
    return mode


def make(base: str = "AdamW", dtype: torch.dtype = torch.float64, **options: Any) -> tuple[list[Tensor], Any, Mechanic]:
    parameters, loss = problem(dtype)
    groups = [{"params": parameters[:1]}, {"params": parameters[1:]}]
    return parameters, loss, Mechanic(FUSED[base](groups), **{"nonfinite": "skip", **options})


def train(parameters: list[Tensor], loss: Any, optimizer: Mechanic, steps: Any, bad: Any = ()) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss(step).backward()
        if step in bad:
            parameters[1].grad[2, 1] = bad[step]
        optimizer.step()


def assert_same(one: Mechanic, other: Mechanic) -> None:
    """Parameters, the base's state, references and the tuner, but for the count of steps left out."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert torch.equal(one.scale, other.scale)
    for p, q in zip(params(one), params(other), strict=True):
        assert torch.equal(p, q)
    assert ours["state"].keys() == theirs["state"].keys()
    for key, state in ours["state"].items():
        assert state.keys() == theirs["state"][key].keys()
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs["state"][key][name])), name


def params(optimizer: Mechanic) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("base", FUSED)
@pytest.mark.parametrize("nonfinite", ["skip", "ignore"])
def test_the_host_asks_for_no_number(base: str, nonfinite: str, asked: Asked) -> None:
    parameters, loss, optimizer = make(base, nonfinite=nonfinite)
    train(parameters, loss, optimizer, range(FIRST))
    asked.count = 0
    for step in range(FIRST, FIRST + 5):
        optimizer.zero_grad()
        loss(step).backward()
        with asked:
            optimizer.step()
    assert asked.count == 0
    with asked:  # the test can fail
        optimizer.scale.item()
    assert asked.count == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("scale", ["global", "per group"])
@pytest.mark.parametrize("variant", ["multiplicative", Resting()], ids=["default", "rests"])
@pytest.mark.parametrize("base", FUSED)
def test_it_equals_the_run_without_those_steps(base: str, variant: Any, scale: str, value: float) -> None:
    bad = dict.fromkeys((2, 3, FIRST, FIRST + 1, FIRST + 8, STEPS - 1), value)
    good = [step for step in range(STEPS) if step not in bad]
    for nonfinite in ("skip", "raise"):
        parameters, loss, optimizer = make(base, variant=variant, scale=scale)
        train(parameters, loss, optimizer, range(STEPS), bad)
        others, other_loss, undisturbed = make(base, variant=variant, scale=scale, nonfinite=nonfinite)
        train(others, other_loss, undisturbed, good)
        assert_same(optimizer, undisturbed)
        assert optimizer.metrics()["nonfinite_steps"] == len(bad)
        assert undisturbed.metrics()["nonfinite_steps"] == 0


@pytest.mark.parametrize("how", ["load", "copy"])
@pytest.mark.parametrize("stop", [FIRST, FIRST + 1, FIRST + 2, FIRST + 3])
def test_a_run_stopped_beside_a_left_out_step_goes_on_the_same(stop: int, how: str) -> None:
    bad = {FIRST: math.nan, FIRST + 1: math.nan}
    parameters, loss, optimizer = make(variant=Resting())
    train(parameters, loss, optimizer, range(stop), bad)
    if how == "load":
        others, other_loss, resumed = make(variant=Resting())
        for p, q in zip(others, parameters):
            p.data.copy_(q.data)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(others, other_loss, resumed, range(stop, STEPS), bad)
    else:
        resumed = copy.deepcopy(optimizer)
        mine, others = params(optimizer), params(resumed)
        for step in range(stop, STEPS):
            optimizer.zero_grad()
            loss(step).backward()
            if step in bad:
                parameters[1].grad[2, 1] = math.nan
            for p, q in zip(mine, others):
                q.grad = None if p.grad is None else p.grad.clone()
            optimizer.step()
            resumed.step()
    if how == "load":
        train(parameters, loss, optimizer, range(stop, STEPS), bad)
    assert_same(optimizer, resumed)
    assert optimizer.metrics()["nonfinite_steps"] == resumed.metrics()["nonfinite_steps"] == 2


def test_a_load_forgets_that_a_step_was_left_out() -> None:
    parameters, loss, optimizer = make(variant=Resting())
    train(parameters, loss, optimizer, range(FIRST))
    saved, values = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in parameters]
    train(parameters, loss, optimizer, range(FIRST, FIRST + 5), {FIRST + 4: math.nan})
    optimizer.load_state_dict(saved)
    for p, value in zip(parameters, values):
        p.data.copy_(value)
    train(parameters, loss, optimizer, range(FIRST, STEPS))
    others, other_loss, undisturbed = make(variant=Resting())
    train(others, other_loss, undisturbed, range(STEPS))
    assert_same(optimizer, undisturbed)


def test_a_parameter_that_is_not_finite_raises_in_the_next_step() -> None:
    parameters, loss, optimizer = make()
    train(parameters, loss, optimizer, range(FIRST))
    with torch.no_grad():
        parameters[0][0, 0] = math.nan
    train(parameters, loss, optimizer, [FIRST])
    with pytest.raises(NonfiniteError, match="of the value of"):
        train(parameters, loss, optimizer, [FIRST + 1])


def test_squares_without_room_in_float32_cost_one_step() -> None:
    parameters, _, optimizer = make(dtype=torch.float32)
    for step in range(FIRST + 6):
        for p in parameters:
            p.grad = torch.full_like(p, 1e25 if step >= FIRST else 1.0)
        optimizer.step()
    assert optimizer.metrics()["nonfinite_steps"] == 1
    assert all(p.isfinite().all() for p in parameters)


@pytest.mark.parametrize("base", FUSED)
def test_fused_optimizers_leave_a_flagged_step_out(base: str) -> None:
    """The attribute has no public name: this fails if torch renames it."""
    parameters, loss = problem()
    optimizer: Any = FUSED[base](parameters)
    for step in range(3):
        optimizer.zero_grad()
        loss(step).backward()
        if step == 2:
            before = [p.detach().clone() for p in parameters], copy.deepcopy(optimizer.state_dict())
            optimizer.found_inf = torch.ones(())
        optimizer.step()
    assert all(map(torch.equal, parameters, before[0]))
    for old, new in zip(before[1]["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old if old[name] is not None)


def test_many_steps_left_out_in_a_row_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    parameters, loss, optimizer = make()
    train(parameters, loss, optimizer, range(FIRST))
    with caplog.at_level("WARNING"):
        train(parameters, loss, optimizer, range(FIRST, FIRST + 22), dict.fromkeys(range(FIRST, FIRST + 22), math.nan))
    assert "has left out 20 steps in a row" in caplog.text


def _fsdp(skips: bool) -> tuple[list[Tensor], float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    for layer in (*model, model):
        fully_shard(layer)
    optimizer = Mechanic(torch.optim.AdamW(model.parameters(), lr=1.0, fused=True), nonfinite="skip")
    bad = (FIRST, FIRST + 1, FIRST + 5)
    for step in range(FIRST + 10):
        if step in bad and not skips:
            continue
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if step in bad and dist.get_rank() == 1:
            model[0].weight.grad.to_local().fill_(math.nan)
        optimizer.step()
    return [p.full_tensor().detach() for p in model.parameters()], optimizer.scale.item()  # type: ignore[attr-defined]


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_leave_out_what_one_finds(world_size: int) -> None:
    for (ours, scale), (theirs, expected) in zip(
        run(_fsdp, world_size, True), run(_fsdp, world_size, False), strict=True
    ):
        assert scale == expected
        assert all(map(torch.equal, ours, theirs))


def _stages(fused: tuple[bool, bool], who: int, what: str) -> tuple[Tensor, float, float, bool]:
    rank = dist.get_rank()
    torch.manual_seed(rank)
    parameter = nn.Parameter(torch.randn(5, 4))
    base = torch.optim.AdamW([parameter], lr=1.0, fused=fused[rank], foreach=False)
    optimizer = Mechanic(base, nonfinite="skip", pipeline_stages=2)
    deferred = False
    for step in range(FIRST + 8):
        if what == "none" and step in (FIRST, FIRST + 1):
            continue
        torch.manual_seed(step)
        parameter.grad = torch.randn(5, 4) + parameter.detach()
        if what == "tiny" and step == FIRST:
            parameter.grad *= 1e-14
        if what == "nan" and step in (FIRST, FIRST + 1) and rank == who:
            parameter.grad[0] = math.nan
        optimizer.step()
        deferred |= optimizer._state.deferral is not None
    return parameter.detach(), optimizer.scale.item(), optimizer.metrics()["nonfinite_steps"].item(), deferred


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("fused", [(True, False), (False, True), (True, True)])
def test_ranks_that_wait_and_ranks_that_do_not_agree(fused: tuple[bool, bool], who: int) -> None:
    results = run(_stages, 2, fused, who, "nan")
    for rank, (ours, theirs) in enumerate(zip(results, run(_stages, 2, fused, who, "none"), strict=True)):
        assert torch.equal(ours[0], theirs[0])
        assert ours[1] == theirs[1]
        assert (ours[2], theirs[2]) == (2, 0)
        assert ours[3] >= fused[rank]


@pytest.mark.parametrize("fused", [(True, False), (False, False), (True, True)])
def test_sums_that_lose_digits_do_not_part_the_ranks(fused: tuple[bool, bool]) -> None:
    (_, one, left_out, _), (_, other, _, _) = run(_stages, 2, fused, 0, "tiny")
    assert one == other
    assert left_out == 0


def _late_group(bad: int) -> tuple[list[float], float]:
    """The second group is empty on rank 0, and gets its first gradient on rank 1 in step FIRST."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    first, second = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(5, 4))
    groups = [{"params": [first]}, {"params": [second] if rank else []}]
    base = torch.optim.AdamW(groups, lr=1.0, fused=True)
    optimizer = Mechanic(base, nonfinite="skip", scale="per group", pipeline_stages=2)
    second.requires_grad_(False)
    for step in range(FIRST + 6):
        torch.manual_seed(step)
        first.grad = torch.randn(5, 4) + first.detach()
        if step >= FIRST and rank:
            second.requires_grad_(True)
            second.grad = torch.randn(5, 4) + second.detach()
        if step == bad and rank:
            first.grad[0] = math.nan
        optimizer.step()
    return optimizer.scale.tolist(), optimizer.metrics()["nonfinite_steps"].item()


@pytest.mark.parametrize(("bad", "left_out"), [(FIRST, 1.0), (FIRST + 2, 1.0), (-1, 0.0)])
def test_a_group_that_begins_in_a_left_out_step_parts_no_ranks(bad: int, left_out: float) -> None:
    (ours, count), (theirs, other) = run(_late_group, 2, bad, timeout=60)
    assert ours == theirs
    assert count == other == left_out


def test_momentum_that_begins_in_a_left_out_step_is_not_made_of_nothing() -> None:
    parameters, loss, optimizer = make("SGD")
    train(parameters, loss, optimizer, range(FIRST))
    for group in optimizer.param_groups:
        group["momentum"] = 0.9
    train(parameters, loss, optimizer, [FIRST], {FIRST: math.nan})
    assert not any("momentum_buffer" in state for state in optimizer.state.values())
