"""References move after a step that was taken, of parameters that were moved, and not otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from manic import Mechanic
from manic.distributed.layout import local
from manic.step import chunks
from manic.step.guard import NonfiniteError
from manic.testing import ranks, run
from manic.tuners.base import Learned, Sums, Tuner
from support.failing import EVERY, FailsAt, operators
from support.horizons import FollowingStart, Horizons, HorizonsReference
from support.layouts import setup
from support.problems import problem
from support.snapshots import backward, differing, everything, take_steps
from support.tuners import rows_of, state_of

TUNERS = [Horizons, FollowingStart]
NAMES = ["mechanic_x_ref", "mechanic_x_ref_1", "mechanic_x_ref_2"]
BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1.0, weight_decay=0.1),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.9, weight_decay=0.01),
}


def groups_of(parameters: list[Tensor]) -> list[dict[str, Any]]:
    return [{"params": [parameter]} for parameter in parameters]


def make(
    tuner: type[Tuner] = Horizons, base: str = "adamw", dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[list[Tensor], Callable[[int], Tensor], Mechanic]:
    parameters, loss = problem(dtype)
    return parameters, loss, Mechanic(BASES[base](groups_of(parameters)), variant=tuner(), **options)


def step_on(parameters: list[Tensor], loss: Callable[[int], Tensor], optimizer: Any, number: int) -> None:
    for parameter in parameters:
        parameter.grad = None
    loss(number).backward()
    optimizer.step()


def references(optimizer: Mechanic, parameter: Tensor) -> list[Tensor]:
    return [local(optimizer.state[parameter][name]) for name in NAMES]


def copies(optimizer: Mechanic, parameters: list[Tensor]) -> list[Tensor]:
    return [each.clone() for p in parameters for each in references(optimizer, p)]


def assert_equal(found: list[Tensor], expected: list[Tensor], where: str = "") -> None:
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected)), where


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize(("dtype", "store_delta"), [
    (torch.float64, True), (torch.float64, False), (torch.float32, None), (torch.bfloat16, None),
    (torch.bfloat16, False), (torch.float16, None),
], ids=str)  # fmt: skip
def test_a_reference_is_an_average_of_where_x_was(
    tuner: type[Tuner], dtype: torch.dtype, store_delta: bool | None
) -> None:
    """In low precision those that follow are float32, and follow x with what it has lost to rounding."""
    parameters, loss, optimizer = make(tuner, "sgd", dtype, store_delta=store_delta)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dtypes = [wide if rate else dtype for rate in tuner.references]
    expected = [[p.detach().to(kind, copy=True) for kind in dtypes] for p in parameters]
    for number in range(12):
        step_on(parameters, loss, optimizer, number)
        for p, mine in zip(parameters, expected):
            state, found = optimizer.state[p], references(optimizer, p)
            assert [each.dtype for each in found] == dtypes
            place = p.detach().to(wide)
            if "mechanic_delta" in state:
                place = state["mechanic_x_ref"].to(wide) + state["mechanic_delta"]
                torch.testing.assert_close(place.to(dtype), p.detach())
            for index, rate in enumerate(tuner.references):
                share = min(1.0, rate / (number + 1))
                mine[index] = mine[index] + share * (place - mine[index]) if share else mine[index]
                rounding = 1e-12 if dtype == torch.float64 else 1e-5
                torch.testing.assert_close(found[index], mine[index].to(dtypes[index]), rtol=rounding, atol=rounding)
    assert not torch.equal(references(optimizer, parameters[0])[1], references(optimizer, parameters[0])[2])
    optimizer.check_consistency()


def test_in_low_precision_small_moves_are_kept() -> None:
    parameter = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    optimizer = Mechanic(torch.optim.SGD([parameter], lr=1e-6), variant=Horizons())
    for _ in range(40):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(4, dtype=torch.bfloat16)), "x itself has not moved"
    reference = optimizer.state[parameter]["mechanic_x_ref_1"]
    assert (reference < 1.0).all()
    assert (reference > 1.0 + optimizer.state[parameter]["mechanic_delta"]).all()


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("how", ["lr", "requires_grad"])
@pytest.mark.parametrize("tuner", TUNERS)
def test_a_parameter_that_stays_keeps_its_references(tuner: type[Tuner], how: str, base: str) -> None:
    parameters, loss, optimizer = make(tuner, base)
    theirs, their_loss = problem()
    reference = HorizonsReference(theirs, BASES[base](groups_of(theirs)), tuner.references)
    for number in range(24):
        if is_frozen := 8 <= number < 16:
            before = copies(optimizer, parameters[:1])
        for group in (optimizer.param_groups[0], reference.base.param_groups[0]):
            if how == "lr":
                group["lr"] = 0.0 if is_frozen else 1.0
            else:
                group["params"][0].requires_grad_(not is_frozen)
        step_on(parameters, loss, optimizer, number)
        step_on(theirs, their_loss, reference, number)
        assert optimizer.scale.item() == pytest.approx(reference.scale, rel=1e-9), number
        if is_frozen:
            assert_equal(copies(optimizer, parameters[:1]), before)
    for index, p in enumerate(parameters):
        for found, expected in zip(references(optimizer, p), reference.references):
            torch.testing.assert_close(found, expected[index], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("nonfinite", ["raise", "skip", "ignore"])
@pytest.mark.parametrize("store_delta", [True, False])
def test_a_step_with_bad_gradients_moves_none(tuner: type[Tuner], nonfinite: Any, store_delta: bool) -> None:
    parameters, loss, optimizer = make(tuner, nonfinite=nonfinite, store_delta=store_delta)
    for number in range(5):
        step_on(parameters, loss, optimizer, number)
    before = copies(optimizer, parameters)
    for p in parameters:
        p.grad = torch.full_like(p, math.nan)
    if nonfinite == "raise":
        with pytest.raises(NonfiniteError):
            optimizer.step()
    else:
        optimizer.step()
    assert parameters[0].isfinite().all() == (nonfinite != "ignore")
    if nonfinite != "ignore" or not store_delta:  # x_ref + Delta is where x is, which is nowhere
        assert_equal(copies(optimizer, parameters), before)


def fail_in_the_base(layout: str, is_late: bool) -> None:
    prepared = setup(layout, "adamw", torch.float64, variant=Horizons())
    take_steps(prepared, 0, 4)
    backward(prepared, 4)
    before, base = everything(prepared), prepared.mechanic.optimizers[0]
    step = base.step

    def fail(*_: Any) -> None:
        if is_late:
            step()
        raise OSError("out of luck")

    base.step = fail  # type: ignore[assignment, method-assign]
    with pytest.raises(OSError, match="out of luck"):
        prepared.mechanic.step()
    base.step = step  # type: ignore[method-assign]
    changed = differing(before, everything(prepared))
    assert not [name for name in changed if name.startswith(("mechanic", "tuner", "group"))], changed
    assert is_late or not changed, changed


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize(("layout", "world_size"), [
    ("single", 1), ("ddp", 2), ("fsdp2", 3), ("tp+fsdp2", 4), ("fsdp1-orig", 2), ("zero1", 2),
])  # fmt: skip
def test_an_error_in_the_base_step_moves_none(layout: str, world_size: int, is_late: bool) -> None:
    run(fail_in_the_base, world_size, layout, is_late)


@EVERY
@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize(("dtype", "options"), [
    (torch.float64, {}), (torch.float64, {"store_delta": True, "nonfinite": "ignore"}), (torch.bfloat16, {}),
], ids=str)  # fmt: skip
def test_an_error_at_any_operator_moves_none_or_follows_the_step(
    tuner: type[Tuner], dtype: torch.dtype, options: dict[str, Any], every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "SMALL", 10)
    monkeypatch.setattr(chunks, "CPU_PIECE", 12)

    def started() -> tuple[list[Tensor], Mechanic]:
        generator = torch.Generator().manual_seed(0)
        parameters = [
            torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in [(3,), (2,), (30,)]
        ]
        optimizer = Mechanic(BASES["adamw"](parameters), variant=tuner(), **options)
        for number in range(10):
            for p in parameters:
                p.grad = p.detach() * (number + 1) - 0.5
            if number < 9:
                optimizer.step()
        return parameters, optimizer

    parameters, optimizer = started()
    before = copies(optimizer, parameters)
    with FailsAt(None) as whole:
        optimizer.step()
    moved_to, moved = [p.detach().clone() for p in parameters], copies(optimizer, parameters)
    taken = 0
    for at in operators(whole.count, every, (tuner.name, dtype, options)):
        parameters, optimizer = started()
        with pytest.raises(MemoryError), FailsAt(at) as mode:
            optimizer.step()
        where = f"operator {at} of {whole.count}, {mode.failed_in}"
        found, is_taken = copies(optimizer, parameters), rows_of(state_of(optimizer), tuner())["updates"] == 10
        taken += bool(is_taken)
        if is_taken:
            assert_equal([p.detach() for p in parameters], moved_to, where)
            for each, old, new in zip(found, before, moved):
                assert ((each == old) | (each == new)).all(), where
        else:
            assert_equal(found, before, where)
        optimizer.check_consistency()
    assert taken > 3


@pytest.mark.parametrize("tuner", TUNERS)
def test_rebase_sets_all_to_x(tuner: type[Tuner]) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        parameters, loss, optimizer = make(tuner, dtype=dtype)
        for number in range(5):
            step_on(parameters, loss, optimizer, number)
        with torch.no_grad():
            parameters[0].mul_(0.5)
        optimizer.rebase()
        for p in parameters:
            assert_equal([each.to(dtype) for each in references(optimizer, p)], [p.detach()] * 3)
        step_on(parameters, loss, optimizer, 5)
        optimizer.check_consistency()


def test_a_parameter_that_is_added_later_begins_where_it_is() -> None:
    parameters, loss, optimizer = make()
    for number in range(9):
        step_on(parameters, loss, optimizer, number)
    extra = torch.full((3,), 2.0, dtype=torch.float64, requires_grad=True)
    optimizer.add_param_group({"params": [extra]})
    extra.grad = torch.zeros_like(extra)
    optimizer.param_groups[-1]["weight_decay"] = 0.0
    optimizer.step()
    assert_equal(references(optimizer, extra), [torch.full((3,), 2.0, dtype=torch.float64)] * 3)


def test_a_group_that_ascends_has_the_sign_of_its_gradients() -> None:
    scales = []
    for ascends in (False, True):
        parameters, loss = problem()
        optimizer = Mechanic(torch.optim.SGD(parameters, lr=1.0, momentum=0.9, maximize=ascends), variant=Horizons())
        for number in range(12):
            optimizer.zero_grad()
            (-loss(number) if ascends else loss(number)).backward()
            optimizer.step()
        scales.append(optimizer.scale.item())
    assert scales[0] == scales[1] != 0.01


def test_state_that_is_only_looked_at_changes_nothing() -> None:
    scales = []
    for looks in (False, True):
        prepared = setup("single", "adamw", torch.float64, variant=Horizons())
        if looks:
            found: Any = get_optimizer_state_dict(prepared.model, prepared.optimizer)["state"]
            assert set(NAMES) <= found["up.weight"].keys()
        take_steps(prepared, 0, 6)
        scales.append(everything(prepared))
    assert differing(*scales) == []


@ranks(2)
@pytest.mark.parametrize("name", NAMES)
def test_one_bit_on_one_rank_is_found(name: str) -> None:
    prepared = setup("ddp", "adamw", torch.float64, variant=Horizons())
    take_steps(prepared, 0, 3)
    prepared.mechanic.check_consistency()
    parameter = prepared.mechanic.param_groups[0]["params"][1]
    with torch.no_grad():
        prepared.mechanic.state[parameter][name][2] *= 1.0 + dist.get_rank() * 1e-15
    with pytest.raises(RuntimeError, match=rf"apart: {name.removeprefix('mechanic_')} of parameter 1 of group 0"):
        prepared.mechanic.check_consistency()


class Seen(FollowingStart):
    """Keeps how far x was from the reference that is at x until the eighth update."""

    def __init__(self) -> None:
        super().__init__()
        self.distances: list[float] = []

    def learn(self, state: Mapping[str, Tensor], sums: Sums) -> Learned:
        self.distances.append(float(sums["delta_square_2"]))
        return super().learn(state, sums)


@pytest.mark.parametrize("options", [{}, {"store_delta": True}, {"store_delta": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_displacement_of_zero_has_no_rounding_error(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """A tuner may divide by it."""
    tuner = Seen()
    parameters, loss = problem(dtype)
    optimizer = Mechanic(BASES["adamw"](groups_of(parameters)), variant=tuner, **options)
    for number in range(10):
        step_on(parameters, loss, optimizer, number)
    assert tuner.distances[:9] == [0.0] * 9
    assert tuner.distances[9] > 0.0
