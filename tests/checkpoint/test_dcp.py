"""Torch's own checkpoint functions, without the Checkpointer, resume a run bit for bit."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._pytree import tree_flatten

from manic import Mechanic
from manic.testing import run
from support.layouts import full, make_net
from support.torch_saving import Result, Run, Wrap, assert_identical


def from_named_parameters(model: nn.Module) -> Optimizer:
    weights = [(name, parameter) for name, parameter in model.named_parameters() if name.endswith("weight")]
    biases = [(name, parameter) for name, parameter in model.named_parameters() if name.endswith("bias")]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    return Mechanic(AdamW(groups, lr=1.0), s_init=1e-3, variant="optax")


def of_two_bases(model: nn.Module) -> Optimizer:
    # By layer: an optimizer over a part of an FSDP1 flat parameter cannot be saved.
    first = [parameter for name, parameter in model.named_parameters() if "up." in name]
    others = [parameter for name, parameter in model.named_parameters() if "up." not in name]
    return Mechanic([SGD(first, lr=1.0), AdamW(others, lr=1.0)], s_init=1e-3, variant="optax")


def a_scale_per_group(model: nn.Module) -> Optimizer:
    names = ("up.", "down."), ("norm.", "head.", "frozen.")
    parts = [[p for name, p in model.named_parameters() if any(each in name for each in part)] for part in names]
    last = [p for p in model.parameters() if not any(p is each for part in parts for each in part)]  # FSDP1's flat one
    return Mechanic([SGD(parts[0], lr=1.0), AdamW([{"params": parts[1] + last}], lr=1.0)], scale="per group")


LAYOUTS = [("single", 1), ("ddp", 2), ("fsdp2", 2), ("tp", 2), ("fsdp1-orig", 2), ("fsdp1-flat", 2)]
LARGE_LAYOUTS = [("fsdp2", 4), ("hsdp", 4), ("tp+fsdp2", 4)]
EVERYWHERE = ["nested", "flat", "full", "gathered on one rank", "files", "staged"]
IMPOSSIBLE = {  # with plain AdamW too
    # Torch takes names and their order from each rank's state. Ranks hold different parameters, or after a load the
    # same parameters in different orders, and then gather states of different names into one.
    ("flat", "fsdp1-orig"),
    ("flat", "fsdp1-flat"),
    # On a CPU, the offloaded tensor is the unsharded parameter itself, whose storage is freed.
    ("gathered on one rank", "fsdp1-orig"),
    ("gathered on one rank", "fsdp1-flat"),
    # A ShardedTensor cannot be staged.
    ("staged", "fsdp1-orig"),
    ("staged", "fsdp1-flat"),
}
COMBINATIONS = [
    *((each, *place) for each in EVERYWHERE for place in LAYOUTS if (each, place[0]) not in IMPOSSIBLE),
    *((each, *place) for each in ("offloaded", "at once", "own file") for place in LAYOUTS[:3]),
    # Slow, so only two: one that gathers and broadcasts, one that reads shards in place.
    *((each, *place) for each in ("gathered on one rank", "flat files") for place in LARGE_LAYOUTS),
    ("full", "tp+fsdp2", 4),
    *((each, *place) for each in ("fsdp1 full", "fsdp1 sharded") for place in LAYOUTS[-2:]),
    # The others read ZeroRedundancyOptimizer's state without consolidating it, which raises.
    ("consolidated", "zero1", 2),
]  # fmt: skip


def train_uninterrupted(layout: str, make: Any) -> dict[int, Result]:
    uninterrupted = Run(layout, make)
    results = {}
    for step in (6, 7, 14):
        uninterrupted.train(step - uninterrupted.scheduler.last_epoch)
        results[step] = uninterrupted.result()
    return results


@functools.cache
def uninterrupted(layout: str, world_size: int, make: Any = None) -> dict[int, Result]:
    expected: dict[int, Result] = run(train_uninterrupted, world_size, layout, make)[0]
    return expected


def stop_and_resume(layout: str, mechanism: str, directory: str, expected: dict[int, Result], make: Any = None) -> None:
    stopped = Run(layout, make)
    stopped.train(6)
    scale = stopped.result()[0]
    saved = stopped.save(mechanism, directory)
    stopped.train(1)  # must not change what was saved
    assert_identical(stopped.result(), expected[7])

    resumed = Run(layout, make)
    resumed.load(mechanism, saved)
    assert resumed.result()[0] == scale
    saved_again = resumed.save(mechanism, f"{directory}/again")
    resumed.train(1)
    assert_identical(resumed.result(), expected[7])
    resumed.load(mechanism, saved_again)  # discards the step since
    resumed.train(8)
    assert_identical(resumed.result(), expected[14])


@pytest.mark.parametrize(("mechanism", "layout", "world_size"), COMBINATIONS)
def test_resumes_bit_for_bit(mechanism: str, layout: str, world_size: int, tmp_path: Path) -> None:
    run(stop_and_resume, world_size, layout, mechanism, str(tmp_path), uninterrupted(layout, world_size))


@pytest.mark.parametrize("make", [from_named_parameters, of_two_bases, a_scale_per_group])
@pytest.mark.parametrize(("mechanism", "layout"), [
    ("gathered on one rank", "fsdp2"), ("flat files", "fsdp2"), ("flat files", "ddp"), ("nested", "fsdp1-orig"),
])  # fmt: skip
def test_named_parameters_and_several_bases_resume_bit_for_bit(
    layout: str, mechanism: str, make: Any, tmp_path: Path
) -> None:
    expected = uninterrupted(layout, 2, make)
    run(stop_and_resume, 2, layout, mechanism, str(tmp_path), expected, make)


def in_layers(wrap: Wrap) -> Wrap:
    def wrap_layers(model: nn.Module) -> nn.Module:
        for name in ("up", "down", "norm"):
            setattr(model, name, wrap(getattr(model, name)))
        return model

    return wrap_layers


def compile_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def bare(model: nn.Module) -> nn.Module:
    return model


compiled: Wrap = functools.partial(torch.compile, backend="eager")  # type: ignore[assignment]
checkpointed = in_layers(checkpoint_wrapper)
WRAPPERS: dict[str, list[Wrap]] = {
    "DDP": [DistributedDataParallel],
    "module.compile": [compile_in_place],
    "torch.compile": [compiled],
    "checkpoint_wrapper": [checkpointed],
    "DDP of torch.compile": [compiled, DistributedDataParallel],
    "torch.compile of DDP": [DistributedDataParallel, compiled],
    "torch.compile of checkpointed layers": [checkpointed, in_layers(compiled)],
    "DDP of all these": [checkpointed, in_layers(compiled), DistributedDataParallel, compile_in_place],
}


def wrapped(model: nn.Module, wrappers: str) -> nn.Module:
    return functools.reduce(lambda inner, wrap: wrap(inner), WRAPPERS[wrappers], model)


def move_between_wrapped_and_bare(layout: str, wrappers: str, directory: str) -> None:
    names = [name for name, _ in make_net().named_parameters()]
    wrap: Wrap = functools.partial(wrapped, wrappers=wrappers)
    for source, target in ((wrap, bare), (bare, wrap)):
        left = Run(layout, wrap=source)
        left.train(3)
        saved = {mechanism: left.save(mechanism, directory) for mechanism in ("nested", "flat")}
        (model, nested), (_, flat) = (saved[mechanism][0] for mechanism in saved)
        assert set(model) == set(names)
        assert [name for group in nested["param_groups"] for name in group["params"]] == names
        assert set(nested["state"]) == {name for name in names if "frozen" not in name}
        assert {key.split(".", 1)[1].rpartition(".")[0] for key in flat} == set(names)
        left.train(3)
        for mechanism in saved:
            entered = Run(layout, wrap=target)
            entered.load(mechanism, saved[mechanism])
            entered.train(3)
            assert_identical(entered.result(), left.result())


@pytest.mark.parametrize(("layout", "wrappers"), [
    *(("single", wrappers) for wrappers in WRAPPERS),
    ("fsdp2", "module.compile"), ("fsdp2", "torch.compile of checkpointed layers"),
])  # fmt: skip
def test_state_moves_between_wrapped_and_bare_modules(layout: str, wrappers: str, tmp_path: Path) -> None:
    run(move_between_wrapped_and_bare, 2, layout, wrappers, str(tmp_path))


def read_and_load(layout: str, mechanism: str, directory: str, expected: dict[int, Result]) -> None:
    observed = Run(layout)
    start = observed.save(mechanism, directory)
    observed.save(mechanism, directory)
    observed.train(3)
    middle = observed.save(mechanism, directory)
    observed.train(3)
    assert_identical(observed.result(), expected[6])

    histories: list[list[Any]] = [
        [start], [1, start, start], [start, middle, middle], [middle, 1, start],
    ]  # fmt: skip
    for history in histories:
        disturbed = Run(layout)
        for event in history:
            if isinstance(event, int):
                disturbed.train(event)
            else:
                disturbed.load(mechanism, event)
        disturbed.train(6 - disturbed.scheduler.last_epoch)
        assert_identical(disturbed.result(), expected[6])


@pytest.mark.parametrize(("layout", "mechanism"), [
    *((layout, mechanism) for layout in ("ddp", "fsdp2") for mechanism in ("nested", "flat", "flat files")),
    ("fsdp1-orig", "nested"), ("fsdp1-flat", "nested"),
])  # fmt: skip
def test_reading_or_loading_state_does_not_affect_later_loads(layout: str, mechanism: str, tmp_path: Path) -> None:
    run(read_and_load, 2, layout, mechanism, str(tmp_path), uninterrupted(layout, 2))


def read_state_of_one_element() -> None:
    torch.manual_seed(0)
    results = []
    for reads in (False, True):
        model = nn.Linear(4, 1, dtype=torch.float64)
        fully_shard(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.5)
        optimizer = Mechanic(AdamW(model.parameters(), lr=1.0), s_init=1e-3, variant="optax")
        if reads:
            set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, optimizer))
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 4, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
        results.append((optimizer.scale.item(), [full(parameter) for parameter in model.parameters()]))
    assert_identical(*results)


def test_reading_the_state_of_a_parameter_on_one_rank_changes_nothing() -> None:
    run(read_state_of_one_element, 2)


def save_twice(layout: str, directory: str) -> tuple[Path, Path]:
    started = Run(layout)
    started.train(3)
    path, _ = started.save("files", directory)
    (saving, staged), _ = started.save("staged", directory)
    started.train(3)
    saving.result()
    return path, staged


@pytest.mark.parametrize(("layout", "world_size"), [("ddp", 2), ("fsdp2", 4)])
def test_async_save_of_dcp_equals_save(layout: str, world_size: int, tmp_path: Path) -> None:
    stored = []
    for path in run(save_twice, world_size, layout, str(tmp_path))[0]:
        dcp_to_torch_save(path, tmp_path / "whole.pt")
        stored.append(tree_flatten(torch.load(tmp_path / "whole.pt", weights_only=True)))
    (leaves, structure), (staged_leaves, staged_structure) = stored
    assert structure == staged_structure
    for leaf, staged in zip(leaves, staged_leaves, strict=True):
        assert torch.equal(leaf, staged) if isinstance(leaf, Tensor) else leaf == staged
