"""Allocations of a step: a chunk in displacement space, one copy for a snapshot; and the state at rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manic import Mechanic
from manic.step.chunks import CPU_PIECE

SIZE = 5 * CPU_PIECE


class Allocations(TorchDispatchMode):
    """Records the sizes, in elements, of new tensors that do not share storage with an operator's inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **kwargs)
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known:
                self.sizes.append(t.numel())
        return result


def step(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[int]:
    parameter.grad = torch.ones_like(parameter)
    with Allocations() as log:
        optimizer.step()
    return log.sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("options", "copies"), [
    ({}, 0), ({"store_delta": False}, 0), ({"update": "snapshot"}, 1),
    ({"variant": "pytorch"}, 1), ({"variant": "pytorch", "store_delta": False}, 1),
    ({"variant": "multiplicative"}, 0), ({"variant": "multiplicative", "store_delta": False}, 0),
    ({"variant": "multiplicative", "store_delta": False, "nonfinite": "ignore"}, 0),
], ids=str)  # fmt: skip
def test_a_step_allocates_chunks_and_at_most_a_snapshot(
    options: dict[str, Any], copies: int, dtype: torch.dtype
) -> None:
    parameter = torch.ones(SIZE, dtype=dtype, requires_grad=True)
    optimizer = Mechanic(
        torch.optim.AdamW([parameter], lr=1.0, weight_decay=0.1, fused=True), **{"variant": "optax", **options}
    )
    step(optimizer, parameter)
    sizes = step(optimizer, parameter)
    assert sorted(size for size in sizes if size > CPU_PIECE) == [SIZE] * copies


@pytest.mark.parametrize(("options", "copies"), [
    ({}, 2), ({"store_delta": False}, 1), ({"variant": "multiplicative"}, 2),
], ids=str)  # fmt: skip
def test_at_rest_holds_references_and_delta(options: dict[str, Any], copies: int) -> None:
    parameter = torch.ones(SIZE, requires_grad=True)
    base = torch.optim.AdamW([parameter], lr=1.0, fused=True)
    optimizer = Mechanic(base, **{"variant": "optax", **options})
    step(optimizer, parameter)
    held = [name for name, value in optimizer.state[parameter].items() if value.numel() == SIZE]
    assert len(held) == 2 + copies  # two are AdamW's
