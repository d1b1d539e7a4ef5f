"""One small all_reduce per step, overlapped with the base step, in every layout and on ranks without gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from manic import Mechanic
from manic.testing import ranks, run
from support.layouts import setup, train

LAYOUTS = [
    ("ddp", 2), ("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4), ("tp", 2), ("tp+fsdp2", 4), ("mixed", 4),
    ("fsdp1-orig", 2), ("fsdp1-flat", 4), ("fsdp1-hybrid", 4), ("pipeline", 2),
]  # fmt: skip


@pytest.mark.parametrize(("variant", "sizes"), [
    ("optax", [32]),
    ("multiplicative", [64]),  # includes the learning rate
    ("pytorch", [16, 16]),  # half of its sums need the base step
])  # fmt: skip
@pytest.mark.parametrize(("layout", "world_size", "nonfinite"), [
    *((*each, "raise") for each in LAYOUTS), ("fsdp2", 2, "ignore"), ("pipeline", 2, "ignore"),
])  # fmt: skip
def test_one_all_reduce_of_at_most_64_bytes(
    layout: str, world_size: int, variant: str, sizes: list[int], nonfinite: str
) -> None:
    options = {"variant": variant, "nonfinite": nonfinite}
    for trained in run(train, world_size, layout, "adamw", 4, torch.float64, options):
        steps = trained.collectives[1:]  # the first step also runs the startup check
        if layout == "pipeline":  # the test broadcasts the parameters of each stage
            steps = [[call for call in step if call[0] != "broadcast_"] for step in steps]
        assert steps == [[("allreduce_", size) for size in sizes]] * 3


@ranks(2)
def test_zero_adds_only_its_broadcasts() -> None:
    trained = train("zero1", "adamw", 4)
    for step in trained.collectives[1:]:
        assert [call for call in step if call[0] != "broadcast_"] == [("allreduce_", 32)]


@ranks(2)
@pytest.mark.parametrize(("nonfinite", "order"), [
    ("ignore", ["started", "base begins", "base ends", "awaited"]),
    ("raise", ["started", "awaited", "base begins", "base ends"]),
])  # fmt: skip
def test_overlaps_the_all_reduce_with_the_base_step_or_awaits_it_first(nonfinite: str, order: list[str]) -> None:
    events: list[str] = []
    all_reduce = dist.all_reduce

    class Work:
        def __init__(self, work: dist.Work) -> None:
            self.work = work

        def wait(self) -> None:
            events.append("awaited")
            self.work.wait()

    def recording(*args: Any, **kwargs: Any) -> Work:
        events.append("started")
        assert kwargs["async_op"]
        return Work(all_reduce(*args, **kwargs))

    prepared = setup("fsdp2", "adamw", torch.float32, nonfinite=nonfinite)
    base = prepared.mechanic.optimizers[0]
    base.register_step_pre_hook(lambda *_: events.append("base begins"))
    base.register_step_post_hook(lambda *_: events.append("base ends"))
    for _ in range(2):
        prepared.model(torch.randn(4, 6)).sum().backward()
        events.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_reduce", recording)
            prepared.optimizer.step()
    assert events == order


@ranks(2)
def test_a_rank_without_gradients_or_with_lr_zero_takes_part() -> None:
    rank = dist.get_rank()
    parameter = torch.arange(3.0, dtype=torch.float64).add(10 * rank).requires_grad_()
    groups = [{"params": [parameter] if rank == each else [], "lr": 1.0 - each} for each in (0, 1)]
    optimizer = Mechanic(torch.optim.SGD(groups), plain="sharded", s_init=0.1, variant="optax")
    for step in range(3):
        if rank == 0 or step == 1:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        parameter.grad = None
    scales = [None, None]
    dist.all_gather_object(scales, optimizer.scale.item())
    assert scales[0] == scales[1]


@ranks(3, timeout=15)
def test_a_rank_without_parameters_takes_part() -> None:
    rank = dist.get_rank()
    parameters = [torch.full((4,), 1.0 + i, dtype=torch.float64, requires_grad=True) for i in range(1 - min(rank, 1))]
    base = torch.optim.SGD([{"params": parameters}], lr=1.0)
    optimizer = Mechanic(base, plain="sharded", s_init=0.1, variant="optax")
    for _ in range(5):
        for parameter in parameters:
            parameter.grad = 2 * parameter.detach()
        optimizer.step()
    scales: list[float | None] = [None] * 3
    dist.all_gather_object(scales, optimizer.scale.item())
    assert len(set(scales)) == 1
    assert optimizer.metrics()["param_norm"].item() > 0
