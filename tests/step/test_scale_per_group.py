"""With scale="per group" each param group learns as if a Mechanic had it alone, in one all_reduce for all."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from manic import Mechanic, NonfiniteError, mechanize
from manic.testing import ranks, run
from manic.tuners.base import Learned, Sums, Tuner
from support.layouts import Trained, train
from support.problems import problem
from support.tuners import rows_of

BASES: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda parameters: torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.1),
    lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9, weight_decay=0.01),
]


class Following(Tuner):
    """An elementwise tuner with a reference that stays, and one that follows x."""

    name = "following by group"
    scales = "updates"
    sums = ("delta_grad", "grad_square", "delta_square", "delta_square_1", "lr")
    references = (0.0, 2.0)
    per_group = True

    def initial(self) -> Mapping[str, float]:
        return {"s": 0.01}

    def learn(self, state: Mapping[str, Tensor], sums: Sums) -> Learned:
        s = state["s"] * torch.exp(-0.1 * sums["delta_grad"].sign() - 0.01 * sums["delta_square_1"].sqrt())
        return Learned({"s": self._bounded(s)}, sums["delta_grad"])


def in_steps(optimizers: list[Mechanic], parameters: list[Tensor], loss: Callable[[int], Tensor], steps: range) -> Any:
    scales = []
    for step in steps:
        for parameter in parameters:
            parameter.grad = None
        loss(step).backward()
        for optimizer in optimizers:
            optimizer.step()
        scales.append(torch.cat([optimizer.scale.reshape(-1) for optimizer in optimizers]).tolist())
    return scales


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [
    {}, {"nonfinite": "skip"}, {"nonfinite": "ignore"}, {"store_delta": True}, {"update": "snapshot"}, {"s_max": 0.02},
    {"variant": Following()}, {"variant": Following(), "store_delta": True}, {"check_every": 7},
], ids=lambda options: "-".join(options) or "default")  # fmt: skip
def test_two_bases_equal_a_mechanic_for_each(options: dict[str, Any], dtype: torch.dtype) -> None:
    parameters, loss = problem(dtype)
    together = Mechanic([make([p]) for make, p in zip(BASES, parameters)], scale="per group", **options)
    theirs, their_loss = problem(dtype)
    apart = [Mechanic(make([p]), **options) for make, p in zip(BASES, theirs)]
    scales = in_steps([together], parameters, loss, range(40))
    assert scales == in_steps(apart, theirs, their_loss, range(40))
    assert len(set(scales[-1])) == 2 or "s_max" in options
    for mine, other in zip(parameters, theirs):
        assert torch.equal(mine, other)
    together.check_consistency()
    together.rebase()


def test_groups_of_one_base_with_schedules_of_their_own() -> None:
    def factors(step: int) -> tuple[float, float]:
        return 1.0 - step / 40, min(1.0, (step + 1) / 10)

    runs = []
    for is_together in (True, False):
        parameters, loss = problem()
        if is_together:
            optimizers = [Mechanic(BASES[0]([{"params": [p]} for p in parameters]), scale="per group")]
        else:
            optimizers = [Mechanic(BASES[0]([p])) for p in parameters]
        for step in range(30):
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            for group, factor in zip(groups, factors(step)):
                group["lr"] = 0.3 * factor
            scales = in_steps(optimizers, parameters, loss, range(step, step + 1))
        runs.append((scales, [p.detach().clone() for p in parameters]))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1]))


LAYOUTS = [
    ("ddp", 2), ("fsdp2", 3), ("hsdp", 4), ("tp+fsdp2", 4), ("mixed", 4), ("fsdp1-orig", 2), ("fsdp1-flat", 2),
    ("zero1", 2), ("pipeline", 2), ("pipeline", 4),
]  # fmt: skip
OPTIONS: dict[str, Any] = {"variant": "multiplicative", "scale": "per group", "s_init": 1e-2}


@functools.cache
def single() -> Trained:
    return train("single", "adamw by group", 20, torch.float64, OPTIONS)


@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS)
def test_layouts(layout: str, world_size: int) -> None:
    """Equal to one process; in a pipeline of two stages, each has parameters of one group only, or of both."""
    expected = single()
    assert expected.scale[0] != expected.scale[1]
    for trained in run(train, world_size, layout, "adamw by group", 20, torch.float64, OPTIONS):
        assert trained.scale == pytest.approx(expected.scale, rel=1e-9)
        assert trained.metrics["grad_norm"] == pytest.approx(expected.metrics["grad_norm"], rel=1e-8)
        for name, value in expected.parameters.items():
            torch.testing.assert_close(trained.parameters[name], value, rtol=1e-9, atol=1e-9)
        if layout in ("fsdp2", "tp+fsdp2"):  # six sums, and the learning rate with its count, of two groups
            assert trained.collectives[1:] == [[("allreduce_", 2 * 64)]] * 19


def test_metrics_and_the_log_name_groups(caplog: pytest.LogCaptureFixture) -> None:
    parameters, loss = problem()
    logged: list[dict[str, Any]] = []
    cls = mechanize(torch.optim.SGD, log_every=1, log_func=logged.append, scale="per group")
    optimizer = cls([{"params": [p], "lr": lr} for p, lr in zip(parameters, (1.0, 1e7))])
    in_steps([optimizer], parameters, loss, range(2))
    metrics = {name: float(value) for name, value in optimizer.metrics().items()}
    scales = optimizer.scale.tolist()
    assert [metrics[f"scale/{i}"] for i in (0, 1)] == scales == logged[-1]["s"]
    assert [metrics[f"effective_lr/{i}"] for i in (0, 1)] == [scales[0], scales[1] * 1e7]
    assert {"h/0", "h/1", "grad_norm", "param_norm", "nonfinite_steps"} <= metrics.keys()
    assert all(value.dim() == 0 for value in optimizer.metrics().values())
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))
    assert metrics["grad_norm"] == pytest.approx(norm)
    rows_of(optimizer.param_groups[1]["mechanic"], "multiplicative")["s"].fill_(1e3)
    in_steps([optimizer], parameters, loss, range(2, 3))
    (message,) = [record.getMessage() for record in caplog.records if "run away" in record.getMessage()]
    assert "scale of param group 1 is" in message


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "ignore"])
@pytest.mark.parametrize("options", [{}, {"store_delta": True}], ids=str)
def test_a_step_that_is_not_finite_in_one_group_is_none_for_all(options: dict[str, Any], nonfinite: Any) -> None:
    parameters, loss = problem()
    bases = [make([p]) for make, p in zip(BASES, parameters)]
    optimizer = Mechanic(bases, scale="per group", nonfinite=nonfinite, **options)
    in_steps([optimizer], parameters, loss, range(5))
    scales, before = optimizer.scale, [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.ones_like(p)
    assert parameters[1].grad is not None
    parameters[1].grad[0] = math.nan
    if nonfinite == "raise":
        with pytest.raises(NonfiniteError, match="gradient of parameter 0 of group 1"):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.metrics()["nonfinite_steps"] == 1
    assert torch.equal(optimizer.scale, scales)
    if nonfinite != "ignore":
        assert all(torch.equal(p, x) for p, x in zip(parameters, before))
        in_steps([optimizer], parameters, loss, range(5, 10))
        assert not torch.equal(optimizer.scale, scales)


@pytest.mark.parametrize("nonfinite", ["raise", "ignore"])
@pytest.mark.parametrize("how", ["lr", "requires_grad"])
def test_the_column_of_a_frozen_group_waits(how: str, nonfinite: Any) -> None:
    """Frozen from the start, and later in between: its tuner goes on as if these steps had not been."""
    parameters, loss = problem()
    start = [p.detach().clone() for p in parameters]
    groups = [{"params": [p]} for p in parameters]
    optimizer = Mechanic(torch.optim.SGD(groups, lr=0.5), scale="per group", nonfinite=nonfinite)

    def freeze(is_frozen: bool) -> None:
        if how == "lr":
            optimizer.param_groups[0]["lr"] = 0.0 if is_frozen else 0.5
        else:
            parameters[0].requires_grad_(not is_frozen)

    freeze(True)
    scales = in_steps([optimizer], parameters, loss, range(10))
    assert [scale[0] for scale in scales] == [0.0] * 10
    assert scales[-1][1] > scales[0][1] > 0.0
    assert torch.equal(parameters[0], start[0])
    assert not torch.equal(parameters[1], start[1])
    freeze(False)
    first, *rest = in_steps([optimizer], parameters, loss, range(10, 30))
    assert 0.0 < first[0] < rest[-1][0]
    freeze(True)
    held, column = parameters[0].detach().clone(), optimizer.param_groups[0]["mechanic"][4:].clone()
    in_steps([optimizer], parameters, loss, range(30, 40))
    assert torch.equal(parameters[0], held)
    assert torch.equal(optimizer.param_groups[0]["mechanic"][4:], column)


@ranks(2)
def test_a_group_that_never_trains_costs_no_second_all_reduce() -> None:
    trained = [torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_() for _ in range(2)]
    trained[1].requires_grad_(False)
    base = torch.optim.SGD([{"params": [p]} for p in trained], lr=0.1)
    optimizer = Mechanic(base, scale="per group")
    calls: list[int] = []
    all_reduce = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    for step in range(4):
        trained[0].grad = trained[0].detach() - 0.5
        calls.clear()
        dist.all_reduce = counting
        try:
            optimizer.step()
        finally:
            dist.all_reduce = all_reduce
        assert step == 0 or calls == [16]
    assert optimizer.scale[0] > 0.0 == optimizer.scale[1]


@ranks(2)
def test_experts_in_a_group_of_their_own() -> None:
    """Each rank has another expert; their group's S is that of one process with both experts in it."""

    def gradients(step: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(step)
        return [torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(3)]

    def start() -> list[Tensor]:
        generator = torch.Generator().manual_seed(99)
        return [torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]

    rank, (dense, *experts) = dist.get_rank(), start()
    groups: list[dict[str, Any]] = [{"params": [dense]}, {"params": [experts[rank]], "expert_parallel": True}]
    optimizer = Mechanic(torch.optim.SGD(groups, lr=1.0), scale="per group")
    alone, whole = start(), dist.new_group([rank], use_local_synchronization=True)
    both = [{"params": alone[:1]}, {"params": alone[1:]}]
    expected = Mechanic(torch.optim.SGD(both, lr=1.0), scale="per group", process_group=whole)
    for step in range(10):
        dense.grad, *rest = gradients(step)
        experts[rank].grad = rest[rank]
        for p, gradient in zip(alone, gradients(step)):
            p.grad = gradient
        optimizer.step()
        expected.step()
    torch.testing.assert_close(optimizer.scale, expected.scale, rtol=1e-10, atol=0.0)
    torch.testing.assert_close(experts[rank], alone[1 + rank], rtol=1e-10, atol=1e-12)
    optimizer.check_consistency()


@ranks(2)
def test_ranks_with_other_numbers_of_groups_are_refused() -> None:
    parameters = [torch.full((3,), 1.0 + dist.get_rank(), requires_grad=True) for _ in range(1 + dist.get_rank())]
    base = torch.optim.SGD([{"params": [p]} for p in parameters], lr=0.1)
    optimizer = Mechanic(base, scale="per group", pipeline_stages=2)
    for p in parameters:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"different settings: .*scale=for each of . param groups"):
        optimizer.step()


def test_refusals() -> None:
    p = torch.ones(3, requires_grad=True)
    for variant in ("optax", "pytorch"):
        with pytest.raises(ValueError, match=rf"variant '{variant}' learns one scale .* \['multiplicative'\]"):
            Mechanic(torch.optim.SGD([p], lr=1.0), variant=variant, scale="per group")
    with pytest.raises(ValueError, match=r"scale must be one of \('global', 'per group'\), got 'both'"):
        Mechanic(torch.optim.SGD([p], lr=1.0), scale="both")
    unfit = type("Unfit", (Following,), {"scales": "displacement", "references": (0.0,)})
    with pytest.raises(ValueError, match="per_group needs scales='updates'"):
        Mechanic(torch.optim.SGD([p], lr=1.0), variant=unfit(), scale="per group")
