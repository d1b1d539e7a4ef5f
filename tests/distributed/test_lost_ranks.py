"""After a rank is lost, the others raise within the process group's timeout and roll the step back.

Their parameters are x_t again, bit for bit, never Delta; settings, gradients, tuner and grad mode are unchanged.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from gpt.parallel import make_mesh
from manic.testing import ranks
from support.lost_rank_cases import MATRIX, SHORT
from support.lost_ranks import FAULTS, MARGIN, TIMEOUT, Trial, trial


def assert_detected_and_rolled_back(result: Trial, fault: str, closeness: float = 0.0) -> None:
    assert not result.missing, f"ranks {result.missing} hang; the others: {result.survivors}"
    for survivor in result.survivors:
        assert survivor.phase, f"{survivor} did not raise"
        assert result.seconds(survivor) < TIMEOUT + MARGIN, survivor
        assert survivor.error.startswith(("RuntimeError", "Dist")), survivor
        assert "gloo" in survivor.error, f"{survivor} has no error of its process group"
        assert survivor.moved or FAULTS[fault].step == 0, "there is no displacement to roll back"
        assert survivor.off <= closeness, survivor
        assert not survivor.wrong, survivor
        if FAULTS[fault].where == "reduce":
            assert survivor.in_the_all_reduce, survivor
    if "stopped" not in fault:  # a rank that reads from a closed connection raises without waiting
        assert min(map(result.seconds, result.survivors)) < TIMEOUT - 1.0


def lose_a_rank(
    fault: str, layout: str, world_size: int, lost: str, base: str = "adamw", dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Trial:  # fmt: skip
    return trial(fault, world_size, 0 if lost == "first" else world_size - 1, layout, base, dtype, options)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("fault", "layout", "world_size", "lost"), SHORT)
def test_each_fault(fault: str, layout: str, world_size: int, lost: str) -> None:
    assert_detected_and_rolled_back(lose_a_rank(fault, layout, world_size, lost), fault)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("fault", "layout", "world_size", "lost"), [case for case in MATRIX if case not in SHORT])
def test_each_fault_on_each_layout(fault: str, layout: str, world_size: int, lost: str) -> None:
    assert_detected_and_rolled_back(lose_a_rank(fault, layout, world_size, lost), fault)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("base", "dtype", "options", "closeness"), [
    ("adamw", torch.bfloat16, {}, 0.0),  # the parameters' storage holds displacements during the base step
    # The base optimizer has updated Delta itself: x is x_ref + S_t * Delta_{t+1}, the update at the old scale. Delta in
    # place of x would differ a hundred times as much.
    ("sgd", torch.float32, {}, 1.0),  # gradients are replaced by ones with weight decay
    ("sgd", torch.bfloat16, {}, 0.0),
    ("asgd", torch.float32, {}, 0.0),  # a snapshot
    ("adamw", torch.float32, {"variant": "pytorch"}, 0.0),
    ("sgd", torch.float32, {"store_delta": False}, 1.0),  # there is no copy to restore x_t from
    ("adamw", torch.float32, {"store_delta": False}, 1.0),
], ids=str)  # fmt: skip
def test_every_update_rule(base: str, dtype: torch.dtype, options: dict[str, Any], closeness: float) -> None:
    fault = "killed while others are in the all_reduce"
    # In the other modes the all_reduce ends before the first change.
    result = lose_a_rank(fault, "single", 2, "last", base, dtype, nonfinite="ignore", **options)
    assert_detected_and_rolled_back(result, fault, closeness)


def timeout_of(group: dist.ProcessGroup | None) -> timedelta:
    # Torch has no public way to read it.
    timeout: timedelta = (group or dist.group.WORLD)._get_backend(torch.device("cpu")).options._timeout
    return timeout


@ranks(4)
def test_groups_of_a_mesh_have_the_given_timeout() -> None:
    shape, names = (2, 2), ("replicate", "shard")
    by_torch = init_device_mesh("cpu", shape, mesh_dim_names=names)
    mesh = make_mesh("cpu", shape, names, timedelta(seconds=77))
    assert mesh == by_torch
    assert mesh.mesh_dim_names == names
    assert mesh.get_coordinate() == by_torch.get_coordinate()
    for name in names:
        members = dist.get_process_group_ranks(by_torch.get_group(name))
        assert dist.get_process_group_ranks(mesh.get_group(name)) == members
        assert timeout_of(mesh.get_group(name)) == timedelta(seconds=77)
        # The reason for make_mesh: if this fails, remove make_mesh.
        assert timeout_of(by_torch.get_group(name)) == timedelta(minutes=30) != timeout_of(None)
    assert timeout_of(init_device_mesh("cpu", (4,)).get_group()) == timeout_of(None)
