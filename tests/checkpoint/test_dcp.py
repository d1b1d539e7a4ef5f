"""Torch's own checkpoint functions, without the Checkpointer, resume a run bit for bit."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._pytree import tree_flatten, tree_map_only

from manic import Mechanic
from manic.testing import run
from support.layouts import BATCH, batch, full, make_net, setup

Result = tuple[Any, list[Tensor]]
Wrap = Callable[[nn.Module], nn.Module]


def plain(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


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


class Run:
    def __init__(
        self, layout: str, make: Callable[[nn.Module], Optimizer] | None = None, wrap: Wrap | None = None
    ) -> None:
        spread = setup(layout, "adamw", torch.float64, s_init=1e-3)
        self.model = spread.model if wrap is None else wrap(spread.model)
        self.optimizer: Any = spread.optimizer if make is None else make(spread.model)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=20)
        # A wrapped model gets the whole batch on every rank, and its gradients need no averaging.
        self.data_rank, self.data_size = (0, 1) if wrap else (spread.data_rank, spread.data_size)
        self.gather = spread.gather

    def train(self, steps: int) -> None:
        for _ in range(steps):
            x, y = batch(self.scheduler.last_epoch, torch.float64)
            share = BATCH // self.data_size
            part = slice(self.data_rank * share, (self.data_rank + 1) * share)
            self.optimizer.zero_grad()
            (self.model(x[part]) - y[part]).square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()

    def result(self) -> Result:
        """S or each group's, or ``None`` for a plain optimizer, and every parameter."""
        optimizer = getattr(self.optimizer, "optim", self.optimizer)  # inside ZeRO
        scale = optimizer.scale.tolist() if isinstance(optimizer, Mechanic) else None
        return scale, list(self.gather().values())

    def save(self, mechanism: str, directory: str) -> Any:
        Path(directory).mkdir(exist_ok=True)
        saved = MECHANISMS[mechanism].save(self, Path(directory))
        return saved, copy.deepcopy(self.scheduler.state_dict())

    def load(self, mechanism: str, saved: Any) -> None:
        MECHANISMS[mechanism].load(self, saved[0])
        self.scheduler.load_state_dict(copy.deepcopy(saved[1]))


def assert_identical(first: Result, second: Result) -> None:
    assert first[0] == second[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def kept(state: Any) -> Any:
    """A copy of a state dict, whose tensors would otherwise change with the run."""
    return tree_map_only(Tensor, copy.deepcopy, state)


class Mechanism(NamedTuple):
    """Functions that save model and optimizer, and load what the first one returned."""

    save: Callable[[Run, Path], Any]
    load: Callable[[Run, Any], None]


def separately(options: StateDictOptions, loading: StateDictOptions | None = None) -> Mechanism:
    def save(run: Run, _: Path) -> Any:
        model = get_model_state_dict(run.model, options=options)
        return kept((model, get_optimizer_state_dict(run.model, run.optimizer, options=options)))

    def load(run: Run, saved: Any) -> None:
        model, optimizer = kept(saved)
        set_model_state_dict(run.model, model, options=loading or options)
        set_optimizer_state_dict(run.model, run.optimizer, optimizer, options=loading or options)

    return Mechanism(save, load)


def at_once() -> Mechanism:
    def save(run: Run, _: Path) -> Any:
        return kept(get_state_dict(run.model, run.optimizer))

    def load(run: Run, saved: Any) -> None:
        model, optimizer = kept(saved)
        set_state_dict(run.model, run.optimizer, model_state_dict=model, optim_state_dict=optimizer)

    return Mechanism(save, load)


class AppState(Stateful):
    """As in torch's tutorial."""

    def __init__(self, run: Run, options: StateDictOptions | None = None) -> None:
        self.run, self.options = run, options

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.run.model, self.run.optimizer, options=self.options)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.run.model, self.run.optimizer,
            model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=self.options,
        )  # fmt: skip


def in_files(options: StateDictOptions | None = None, planner: Callable[[], Any] = dcp.DefaultLoadPlanner) -> Mechanism:
    def save(run: Run, directory: Path) -> Path:
        path = directory / f"{run.scheduler.last_epoch}"
        dcp.save({"app": AppState(run, options)}, checkpoint_id=path)
        return path

    def load(run: Run, path: Path) -> None:
        dcp.load({"app": AppState(run, options)}, checkpoint_id=path, planner=planner())

    return Mechanism(save, load)


def start_saving(run: Run, directory: Path) -> tuple[Any, Path]:
    # A separate group: training runs its collectives at the same time.
    group = dist.new_group(backend="cpu:gloo")
    path = directory / f"{run.scheduler.last_epoch}, staged"
    return dcp.async_save({"app": AppState(run)}, checkpoint_id=path, process_group=group), path


def finish_and_load(run: Run, saved: tuple[Any, Path]) -> None:
    saved[0].result()
    dcp.load({"app": AppState(run)}, checkpoint_id=saved[1])


def of_fsdp1(kind: StateDictType, *configs: Any) -> Mechanism:
    def save(run: Run, _: Path) -> Any:
        with FullyShardedDataParallel.state_dict_type(run.model, kind, *configs):
            optimizer = FullyShardedDataParallel.optim_state_dict(run.model, run.optimizer)
            return kept((run.model.state_dict(), optimizer))

    def load(run: Run, saved: Any) -> None:
        model, optimizer = kept(saved)
        with FullyShardedDataParallel.state_dict_type(run.model, kind, *configs):
            run.model.load_state_dict(model)
            optimizer = FullyShardedDataParallel.optim_state_dict_to_load(run.model, run.optimizer, optimizer)
            run.optimizer.load_state_dict(optimizer)

    return Mechanism(save, load)


def consolidate(run: Run, _: Path) -> Any:
    run.optimizer.consolidate_state_dict(to=0)
    box = [run.optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return copy.deepcopy((run.model.state_dict(), box[0]))


def load_all(run: Run, saved: Any) -> None:
    model, optimizer = copy.deepcopy(saved)
    run.model.load_state_dict(model)
    run.optimizer.load_state_dict(optimizer)


def write_own_file(run: Run, directory: Path) -> Path:
    path = directory / f"rank {dist.get_rank()}.pt"
    torch.save((run.model.state_dict(), run.optimizer.state_dict()), path)
    return path


def read_own_file(run: Run, path: Path) -> None:
    load_all(run, torch.load(path, weights_only=True))


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
MECHANISMS = {
    "nested": separately(StateDictOptions()),
    "flat": separately(FLAT),
    "full": separately(StateDictOptions(full_state_dict=True)),
    "gathered on one rank": separately(
        StateDictOptions(full_state_dict=True, cpu_offload=True),
        loading=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    ),
    "offloaded": separately(StateDictOptions(cpu_offload=True)),
    "at once": at_once(),
    "files": in_files(),
    "staged": Mechanism(start_saving, finish_and_load),
    "fsdp1 full": of_fsdp1(
        # With offload_to_cpu, FSDP1 on a CPU gives exp_avg the values of exp_avg_sq, with plain AdamW too.
        StateDictType.FULL_STATE_DICT, FullStateDictConfig(), FullOptimStateDictConfig(offload_to_cpu=False),
    ),
    "fsdp1 sharded": of_fsdp1(
        StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(), ShardedOptimStateDictConfig()
    ),
    "consolidated": Mechanism(consolidate, load_all),
    "own file": Mechanism(write_own_file, read_own_file),
    "flat files": in_files(FLAT),
    "flat files, in part": in_files(FLAT, functools.partial(dcp.DefaultLoadPlanner, allow_partial_load=True)),
    "files, in part": in_files(None, functools.partial(dcp.DefaultLoadPlanner, allow_partial_load=True)),
}  # fmt: skip
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


def become_mechanic(layout: str, saving: str, loading: str, into: str, directory: str) -> None:
    """Compare with the plain run, wrapped at the same step."""
    expected = Run(layout, plain)
    expected.train(4)
    saved = expected.save(saving, directory)
    state = copy.deepcopy(expected.optimizer.state_dict()["state"])
    expected.optimizer = Mechanic(expected.optimizer, s_init=1e-3, variant="optax")
    start = expected.result()
    expected.train(4)

    moved = Run(layout, plain if into == "the base, before it is wrapped" else None)
    mechanic = moved.optimizer
    if into == "the base":
        moved.optimizer = mechanic.optimizers[0]
    moved.load(loading, saved)
    moved.optimizer = mechanic if isinstance(mechanic, Mechanic) else Mechanic(mechanic, s_init=1e-3, variant="optax")
    assert_identical(moved.result(), start)
    moved.train(1)
    for index, parameter in enumerate(p for group in moved.optimizer.param_groups for p in group["params"]):
        if parameter.requires_grad:
            assert moved.optimizer.state[parameter]["step"] == state[index]["step"] + 1
            assert torch.equal(full(moved.optimizer.state[parameter]["mechanic_x_ref"]), start[1][index])
    moved.train(3)
    assert_identical(moved.result(), expected.result())


PLAIN_INTO_MECHANIC = [
    ("flat files", "flat files", "the base, before it is wrapped"),
    ("flat files", "flat files, in part", "the base"),
    ("flat files", "flat files, in part", "Mechanic"),
    ("files", "files, in part", "Mechanic"),
    ("nested", "nested", "Mechanic"),
    ("full", "full", "Mechanic"),
    ("gathered on one rank", "gathered on one rank", "Mechanic"),
]


@pytest.mark.parametrize(("saving", "loading", "into"), PLAIN_INTO_MECHANIC)
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_loads_plain_adamw_into_mechanic_with_a_new_tuner(
    layout: str, saving: str, loading: str, into: str, tmp_path: Path
) -> None:
    run(become_mechanic, 2, layout, saving, loading, into, str(tmp_path))


def become_mechanic_late(layout: str, saving: str, loading: str, into: str, directory: str) -> None:
    """Torch's functions load a Mechanic's current state back into it where the checkpoint has none."""
    left = Run(layout, plain)
    left.train(4)
    saved = left.save(saving, directory)
    moved = Run(layout)
    moved.train(2)
    mechanic = moved.optimizer
    if into == "the base":
        moved.optimizer = mechanic.optimizers[0]
    moved.load(loading, saved)
    moved.optimizer = mechanic
    started = mechanic.scale.item() == pytest.approx(6e-3)
    before = moved.result()[1]
    if not started:
        with pytest.raises(ValueError, match="not where the loaded optimizer state says"):
            moved.train(1)
        assert_identical((0.0, moved.result()[1]), (0.0, before))
        mechanic.rebase()
    moved.train(1)
    references = [mechanic.state[p]["mechanic_x_ref"] for p in moved.model.parameters() if p in mechanic.state]
    trained = [x for x, p in zip(before, moved.model.parameters(), strict=True) if p in mechanic.state]
    assert_identical((0.0, [full(reference) for reference in references]), (0.0, trained))


@pytest.mark.parametrize(("saving", "loading", "into"), [
    combination for combination in PLAIN_INTO_MECHANIC if "before" not in combination[2]
])  # fmt: skip
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_loading_plain_adamw_after_steps_resets_the_tuner_or_refuses(
    layout: str, saving: str, loading: str, into: str, tmp_path: Path
) -> None:
    run(become_mechanic_late, 2, layout, saving, loading, into, str(tmp_path))


def load_strictly(layout: str, directory: str) -> None:
    started = Run(layout, plain)
    started.train(2)
    saved = started.save("flat files", directory)
    refusing = Run(layout)
    before = refusing.result()
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: .*mechanic"):
        refusing.load("flat files", saved)
    assert_identical(refusing.result(), before)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_refuses_a_checkpoint_without_a_tuner_by_default(layout: str, tmp_path: Path) -> None:
    run(load_strictly, 2, layout, str(tmp_path))


def become_plain(layout: str, mechanism: str, directory: str) -> None:
    """Compare with the base optimizer, unwrapped at the same step."""
    expected = Run(layout)
    expected.train(4)
    saved = expected.save(mechanism, directory)
    scale = expected.result()[0]
    expected.optimizer = expected.optimizer.optimizers[0]
    moved = Run(layout, plain)
    moved.load(mechanism, saved)
    for each in (expected, moved):
        for group in each.optimizer.param_groups:
            group["lr"] *= scale
        each.train(4)
    assert_identical(moved.result(), expected.result())


@pytest.mark.parametrize("mechanism", ["flat files", "nested", "flat", "full", "gathered on one rank"])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_loads_mechanic_into_plain_adamw_with_its_moments(layout: str, mechanism: str, tmp_path: Path) -> None:
    run(become_plain, 2, layout, mechanism, str(tmp_path))


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
