"""How often declared parameters are held: counted by values and gradients, and compared again until one tells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from manic import Mechanic
from manic.testing import ranks
from support.experts import alone, draw
from support.layouts import CollectiveLog

Spec = dict[str, tuple[list[int], int, str, bool]]
"""By name: the ranks that hold a parameter, its size, its start, and whether it has no gradient in the first step."""

ALL = [0, 1, 2, 3]
ROUTED: Spec = {f"e{rank}": ([rank], 5, "random", False) for rank in ALL}
UNEVEN: Spec = {"e0": ([0], 5, "random", False), "e1": ([1], 5, "random", False), "e2": ([1], 5, "random", False)}
UPCYCLED: Spec = {"e0": ([0, 2], 5, "alike", True), "e1": ([1, 3], 5, "alike", True)}
SPECS: dict[str, Spec] = {
    "a norm on all ranks": {**ROUTED, "norm": (ALL, 7, "ones", False)},
    "biases on two ranks": {**ROUTED, "b0": ([0, 2], 4, "zeros", False), "b1": ([1, 3], 4, "zeros", False)},
    "a router behind uneven experts": {**UNEVEN, "router": (ALL, 7, "random", False)},
    "an expert at two indices": {**UNEVEN, "e3": ([0, 1, 3], 5, "random", False)},
    "copies without tokens": UPCYCLED,
    "copies without tokens, and others": {**UPCYCLED, "e2": ([0, 2], 5, "random", True)},
}


class Specified:
    """The parameters of a spec that a rank holds, or all of them, and a dense one."""

    def __init__(self, spec: Spec, rank: int | None) -> None:
        self.spec = {"dense": (ALL, 3, "random", False), **spec}
        self.held = {
            name: self.make(name, size, start).requires_grad_()
            for name, (holders, size, start, _) in self.spec.items()
            if rank is None or rank in holders
        }

    def make(self, name: str, size: int, start: str) -> Tensor:
        if start in ("ones", "zeros"):
            return torch.full((size,), float(start == "ones"), dtype=torch.float64)
        return draw(7 if start == "alike" else 10 + list(self.spec).index(name), (size,))

    def optimizer(self, variant: str, group: dist.ProcessGroup | None) -> Mechanic:
        dense, *experts = self.held.values()
        groups: list[dict[str, Any]] = [{"params": [dense]}, {"params": experts, "expert_parallel": True}]
        base = torch.optim.AdamW(groups, lr=1.0)
        return Mechanic(base, variant=variant, s_init=1e-2, process_group=group)

    def give_gradients(self, step: int) -> None:
        for name, parameter in self.held.items():
            noise = draw(1000 * (step + 1) + list(self.spec).index(name), (len(parameter),))
            has_none = step == 0 and self.spec[name][3]
            parameter.grad = None if has_none else parameter.detach() - 1.0 + 0.3 * noise


@ranks(4)
@pytest.mark.parametrize("variant", ["optax", "multiplicative"])
@pytest.mark.parametrize("name", SPECS)
def test_declared_parameters_with_numbers_of_copies_of_their_own(name: str, variant: str) -> None:
    runs: list[list[list[float]]] = []
    for group, rank in ((alone(), None), (None, dist.get_rank())):
        problem = Specified(SPECS[name], rank)
        optimizer = problem.optimizer(variant, group)
        runs.append([])
        for step in range(6):
            problem.give_gradients(step)
            optimizer.step()
            runs[-1].append([float(optimizer.scale), float(optimizer.metrics()["param_norm"])])
        optimizer.check_consistency()
    if "without tokens" in name:
        # Counted by their values in the first step. The multiplicative tuner's first length, and so S, are of these.
        runs = [[each[-1:] if variant == "multiplicative" else each for each in run_[1:]] for run_ in runs]
    for one, found in zip(*runs):
        assert found == pytest.approx(one, rel=1e-9 if len(one) == 2 else 0.05)


@ranks(4)
def test_numbers_of_copies_that_contradict_are_refused() -> None:
    """A bias of zeros without a gradient on one rank: equal ones are on three ranks, the weight beside it on one."""
    biases: Spec = {"bias": ([1, 2, 3], 4, "zeros", False), "b0": ([0], 4, "zeros", True)}
    problem = Specified({**ROUTED, **biases}, dist.get_rank())
    optimizer = problem.optimizer("optax", None)
    problem.give_gradients(0)
    with pytest.raises(ValueError, match=r"rank 0: cannot count by its values .* parameter 1 of group 1"):
        optimizer.step()


@ranks(4)
def test_a_check_finds_a_copy_at_another_index_that_drifts() -> None:
    problem = Specified(SPECS["a router behind uneven experts"], dist.get_rank())
    optimizer = problem.optimizer("optax", None)
    problem.give_gradients(0)
    optimizer.step()
    optimizer.check_consistency()
    if dist.get_rank() == 1:
        with torch.no_grad():
            problem.held["router"][0] += 1e-12
    with pytest.raises(RuntimeError, match=r"drifted apart: the value of parameter . of group 1, .* on rank 1 differs"):
        optimizer.check_consistency()


@ranks(4)
@pytest.mark.parametrize(("dtype", "difference", "is_refused"), [
    (torch.bfloat16, 1e-2, False), (torch.float16, 1e-2, False), (torch.float32, 1e-2, True),
    (torch.float32, 1e-5, False), (torch.bfloat16, 0.3, True),
])  # fmt: skip
def test_gradients_of_copies_may_differ_by_rounding(dtype: torch.dtype, difference: float, is_refused: bool) -> None:
    parameter = torch.ones(64, dtype=dtype, requires_grad=True)
    optimizer = Mechanic(torch.optim.SGD([parameter], lr=1.0))
    parameter.grad = (draw(0, (64,)) * (1 + difference * draw(dist.get_rank(), (64,)))).to(dtype)
    if not is_refused:
        optimizer.step()
        return
    with pytest.raises(ValueError, match="has another gradient"):
        optimizer.step()


@ranks(2)
@pytest.mark.parametrize("size", [1e-7, 1e-3])
def test_gradients_that_are_zero_but_for_rounding_are_not_compared(size: float) -> None:
    held = [draw(seed, (8,)).requires_grad_() for seed in range(2)]
    optimizer = Mechanic(torch.optim.SGD(held, lr=1.0))
    held[0].grad, held[1].grad = draw(2, (8,)), size * draw(3 + dist.get_rank(), (8,))
    if size < 1e-5:
        optimizer.step()
        return
    with pytest.raises(ValueError, match=r"parameter 1 of group 0.* has another gradient"):
        optimizer.step()


@ranks(2)
def test_copies_in_low_precision_may_be_an_ulp_apart_when_a_group_is_added() -> None:
    held = [draw(seed, (64,)).to(torch.bfloat16).requires_grad_() for seed in range(2)]
    optimizer = Mechanic(torch.optim.SGD(held[:1], lr=1.0), variant="optax", store_delta=False)
    held[0].grad = torch.ones_like(held[0])
    optimizer.step()
    if dist.get_rank():
        with torch.no_grad():
            held[0].view(torch.int16).add_(1)
    optimizer.add_param_group({"params": held[1:]})
    held[0].grad, held[1].grad = torch.ones_like(held[0]), torch.ones_like(held[1])
    optimizer.step()
    with torch.no_grad():
        held[0] += dist.get_rank()
    optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
    with pytest.raises(ValueError, match=r"parameter 0 of group 0.* differs"):
        optimizer.step()


@ranks(2)
@pytest.mark.parametrize(("first_gradient", "is_frozen", "expected"), [
    (0, False, 1), (2, False, 3), (100, False, 32), (100, True, 1),
])  # fmt: skip
def test_compares_again_until_a_gradient_confirms(first_gradient: int, is_frozen: bool, expected: int) -> None:
    """Equal experts, of which the second rank's has the first gradient."""
    dense, expert = draw(0, (3,)).requires_grad_(), draw(1, (4,)).requires_grad_(not is_frozen)
    groups: list[dict[str, Any]] = [{"params": [dense]}, {"params": [expert], "expert_parallel": True}]
    optimizer = Mechanic(torch.optim.SGD(groups, lr=1.0))
    comparisons = 0
    for step in range(40):
        dense.grad = draw(step, (3,))
        has_gradient = dist.get_rank() == 1 and step >= first_gradient
        expert.grad = draw(step, (4,)) if has_gradient else None
        with CollectiveLog() as log:
            optimizer.step()
        comparisons += any("allgather" in name for name, _ in log.calls)
    assert comparisons == expected
