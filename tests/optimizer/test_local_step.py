"""A base optimizer that steps on local shards does what it does with DTensors, bit for bit."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_module
from torch.utils._python_dispatch import TorchDispatchMode

import manic.mechanic
from manic.optimizer import local_step
from manic.optimizer.local_step import step_on_shards
from manic.testing import ranks, run
from support.failing import FailsAt
from support.layouts import train

# Over two ranks even, uneven, and empty on the second; by columns; of no dimension; of which each rank has all.
SHAPES: list[tuple[tuple[int, ...], Placement]] = [
    ((4, 3), Shard(0)), ((5, 3), Shard(0)), ((1, 3), Shard(0)), ((7,), Shard(0)), ((1,), Shard(0)), ((2, 6), Shard(1)),
    ((), Replicate()), ((3, 2), Replicate()),
]  # fmt: skip

BASES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"weight_decay": 0.1}),
    "SGD, momentum": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "foreach": False}),
    "Adam": (torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True}),
    "Adam, fused": (torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True, "fused": True}),
    "AdamW": (torch.optim.AdamW, {"maximize": True}),
    "AdamW, fused": (torch.optim.AdamW, {"fused": True}),
    "AdamW, foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW, tensors": (torch.optim.AdamW, {"lr": torch.tensor(0.01), "foreach": False}),
    "AdamW, tensors, fused": (torch.optim.AdamW, {"lr": torch.tensor(0.01), "fused": True}),
    "NAdam": (torch.optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "RAdam": (torch.optim.RAdam, {"weight_decay": 0.1}),
    "Adamax": (torch.optim.Adamax, {"weight_decay": 0.1}),
    "Adagrad": (torch.optim.Adagrad, {"weight_decay": 0.1, "lr_decay": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "Adadelta": (torch.optim.Adadelta, {"weight_decay": 0.1}),
    "ASGD": (torch.optim.ASGD, {"weight_decay": 0.1, "t0": 2}),
}
# torch cannot step so on DTensors.
ONLY_PLAIN: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD, fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True, "maximize": True}),
    "Adagrad, fused": (torch.optim.Adagrad, {"fused": True}),
    "Rprop": (torch.optim.Rprop, {}),
}


class Model(nn.Module):
    """DTensors of all shapes, one that has no gradient at first, and a plain tensor, in ``weights``."""

    def __init__(self, shapes: Sequence[tuple[tuple[int, ...], Placement]] = SHAPES) -> None:
        super().__init__()
        self.mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        self.generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList([self.draw(shape, placement) for shape, placement in shapes])
        self.late = self.draw((4, 2), Shard(0))
        self.weights.append(self.late)
        self.weights.append(nn.Parameter(torch.randn(3, 2, generator=self.generator)))

    def draw(self, shape: tuple[int, ...], placement: Placement) -> nn.Parameter:
        values = torch.randn(shape, generator=self.generator)
        return nn.Parameter(distribute_tensor(values, self.mesh, [placement]))

    def base(self, name: str) -> Optimizer:
        cls, options = {**BASES, **ONLY_PLAIN}[name]
        *sharded, plain = self.weights
        groups = [{"params": sharded[:2], "lr": 0.02}, {"params": sharded[2:]}, {"params": [plain]}]
        return cls(groups, **copy.deepcopy(options))  # type: ignore[arg-type]

    def set_gradients(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for parameter in self.weights:
            gradient = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = None if parameter is self.late and step < 2 else gradient


class Operations(TorchDispatchMode):
    """Notes operations, and which of them are on DTensors."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[str] = []
        self.on_dtensors: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        lists = [each if isinstance(each, (list, tuple)) else [each] for each in args]
        self.all.append(str(func))
        if any(isinstance(each, DTensor) for values in lists for each in values):
            self.on_dtensors.append(str(func))
        return func(*args, **(kwargs or {}))


def describe(value: Any) -> Any:
    """All that can be seen of an entry of the state, or of a parameter."""
    if not isinstance(value, Tensor):
        return value
    seen = [type(value), value.dtype, value.device, value.shape, value.stride(), value.requires_grad]
    if not isinstance(value, DTensor):
        return [*seen, value.tolist()]
    part = value.to_local()
    return [*seen, value.device_mesh, value.placements, part.shape, part.stride(), part.tolist()]


def everything(optimizer: Optimizer) -> list[Any]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = [optimizer.state.get(parameter) for parameter in parameters]
    groups = [[(k, describe(v)) for k, v in group.items() if k != "params"] for group in optimizer.param_groups]
    return [
        len(optimizer.state), groups, [describe(parameter) for parameter in parameters],
        [None if state is None else [(name, describe(value)) for name, value in state.items()] for state in states],
    ]  # fmt: skip


def nothing(model: Model, optimizer: Optimizer) -> None:
    pass


def load(model: Model, optimizer: Optimizer) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    for each in saved["state"].values():
        each.update({name: value * 0.5 for name, value in each.items() if isinstance(value, DTensor)})
    optimizer.load_state_dict(saved)


def load_by_dcp(model: Model, optimizer: Optimizer) -> None:
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    for each in saved["state"].values():
        each.update({name: value * 0.5 for name, value in each.items() if isinstance(value, DTensor)})
    set_optimizer_state_dict(model, optimizer, saved)


def add_group(model: Model, optimizer: Optimizer) -> None:
    model.weights.append(model.draw((3, 3), Shard(0)))
    optimizer.add_param_group({"params": [model.weights[-1]], "lr": 0.03})


def exchange_storages(model: Model, optimizer: Optimizer) -> None:
    for parameter in model.weights:
        for tensor in (parameter, *optimizer.state.get(parameter, {}).values()):
            if isinstance(tensor, DTensor):
                tensor._local_tensor = tensor._local_tensor.detach() * 0.5


def forget_a_state(model: Model, optimizer: Optimizer) -> None:
    optimizer.state.pop(model.weights[0], None)


def set_momentum(model: Model, optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group.update({"momentum": 0.5} if "momentum" in group and "centered" not in group else {})


CHANGES = [nothing, load, load_by_dcp, add_group, exchange_storages, forget_a_state, set_momentum]


@ranks(2)
@pytest.mark.parametrize("base", BASES)
def test_it_does_what_the_base_does_with_dtensors(base: str) -> None:
    for change in CHANGES if base in ("AdamW, fused", "SGD, momentum", "SGD") else [nothing, load]:
        (expected, by_itself), (found, on_shards) = [(model, model.base(base)) for model in (Model(), Model())]
        for step in range(5):
            if step == 3:
                change(expected, by_itself)
                change(found, on_shards)
            expected.set_gradients(step)
            found.set_gradients(step)
            with torch.no_grad():
                by_itself.step()
                with Operations() as log:
                    step_on_shards(on_shards)
            assert log.on_dtensors == [], (change.__name__, step)
            assert everything(on_shards) == everything(by_itself), (change.__name__, step)


@ranks(2)
@pytest.mark.parametrize("base", ONLY_PLAIN)
def test_it_does_what_the_base_does_with_plain_shards(base: str) -> None:
    (expected, _), (found, on_shards) = [(model, model.base(base)) for model in (Model(), Model())]
    plain = [local(parameter).clone() for parameter in expected.weights]
    cls, options = ONLY_PLAIN[base]
    groups = [{"params": plain[:2], "lr": 0.02}, {"params": plain[2:]}]
    by_itself = cls(groups, **options)  # type: ignore[arg-type]
    for step in range(2, 5):  # fused SGD cannot have a parameter that is late
        expected.set_gradients(step)
        found.set_gradients(step)
        for parameter, tensor in zip(expected.weights, plain):
            tensor.grad = None if parameter.grad is None else local(parameter.grad)
        with torch.no_grad():
            by_itself.step()
            step_on_shards(on_shards)
        for parameter, tensor in zip(found.weights, plain):
            assert torch.equal(local(parameter), tensor)
            for name, value in by_itself.state[tensor].items():
                seen = on_shards.state[parameter][name]
                is_distributed = isinstance(parameter, DTensor) and name != "step"
                assert isinstance(seen, DTensor) == is_distributed
                assert torch.equal(local(seen), value), name


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def place_otherwise(model: Model, optimizer: Optimizer) -> None:
    """A gradient that is not placed as its parameter is."""
    gradient = model.weights[0].grad
    assert isinstance(gradient, DTensor)
    model.weights[0].grad = gradient.redistribute(placements=[Replicate()])


def place_state_otherwise(model: Model, optimizer: Optimizer) -> None:
    state = optimizer.state[model.weights[0]]
    if "exp_avg" in state:
        state["exp_avg"] = state["exp_avg"].redistribute(placements=[Replicate()])


def hook(model: Model, optimizer: Optimizer) -> None:
    optimizer.register_step_pre_hook(lambda *_: None)


@ranks(2)
@pytest.mark.parametrize("change", [place_otherwise, place_state_otherwise, hook])
def test_what_has_no_plain_shards_is_left_to_the_base(change: Callable[[Model, Optimizer], None]) -> None:
    (expected, by_itself), (found, on_shards) = [(model, model.base("AdamW")) for model in (Model(), Model())]
    for step in range(3):
        for model, optimizer in ((expected, by_itself), (found, on_shards)):
            model.set_gradients(step)
            if step > 0:
                change(model, optimizer)
        with torch.no_grad():
            by_itself.step()
            with Operations() as log:
                step_on_shards(on_shards)
        assert bool(log.on_dtensors) == (step > 0)
        assert everything(on_shards) == everything(by_itself)


@ranks(2)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("base", ["AdamW", "SGD, momentum"])
def test_after_an_error_or_an_interrupt_all_is_as_before(base: str, steps: int) -> None:
    source = local_step.__file__
    for is_interrupt in (False, True):
        at, is_done = 0, False
        while not is_done:
            at += 1
            model = Model(SHAPES[:2])
            optimizer = model.base(base)
            for step in range(steps):
                model.set_gradients(step)
                step_on_shards(optimizer)
            model.set_gradients(2)
            before = things(optimizer)
            names = {key: list(state) for key, state in optimizer.state.items()}
            where: Any = ""
            try:
                if is_interrupt:
                    with interrupt(source, at) as where, torch.no_grad():
                        step_on_shards(optimizer)
                else:
                    with FailsAt(at) as mode, torch.no_grad():
                        step_on_shards(optimizer)
                is_done = True
            except (KeyboardInterrupt, MemoryError):
                where = where if is_interrupt else mode.failed_in
                after = things(optimizer)
                assert all(map(is_, before, after)), where
                assert len(before) == len(after), where
            else:
                assert at > 20
            for parameter, state in optimizer.state.items():
                assert any(parameter is each for each in model.weights), where
                if names.get(parameter):
                    assert list(state) == names[parameter], where
                else:
                    assert set(state) in (set(), *({"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"})), where
                assert_placed(parameter, state)


def things(optimizer: Optimizer) -> list[Any]:
    """The objects that nobody may exchange."""
    found: list[Any] = [optimizer.state]
    for group in optimizer.param_groups:
        found += [group["params"], *group["params"], *(each.grad for each in group["params"])]
        found += [value for name, value in group.items() if name != "params"]
    return found


def assert_placed(parameter: Tensor, state: dict[str, Any]) -> None:
    for name, value in state.items():
        assert isinstance(value, DTensor) == (isinstance(parameter, DTensor) and name != "step"), name


@contextmanager
def interrupt(source: str, at: int) -> Iterator[list[str]]:
    """Raise KeyboardInterrupt at line number ``at`` of those that are executed of a file."""
    count, place = 0, list[str]()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename != source:
            return None
        count += event == "line"
        if event == "line" and count == at:
            place.append(f"line {frame.f_lineno}")
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        yield place
    finally:
        sys.settrace(None)


@ranks(2)
def test_torch_chooses_kernels_as_it_does_for_dtensors() -> None:
    """As on a GPU, where it takes those for lists of tensors of some types."""
    used = []
    for step in (lambda base: base.step(), step_on_shards):
        model = Model()
        optimizer = model.base("AdamW")
        with pytest.MonkeyPatch.context() as patch, Operations() as log, torch.no_grad():
            patch.setattr(optimizer_module, "_get_foreach_kernels_supported_devices", lambda: ["cpu"])
            model.set_gradients(0)
            step(optimizer)
        used.append([name for name in log.all if "_foreach" in name])
    assert used[0] == used[1]
    assert used[0], "none for lists: the test is void"


@ranks(2)
def test_it_holds_no_memory_between_steps() -> None:
    model = Model()
    optimizer = model.base("AdamW")
    for step in range(2):
        model.set_gradients(step)
        step_on_shards(optimizer)
    held = []
    for parameter in model.weights[:-2]:
        assert isinstance(parameter, DTensor)
        assert isinstance(parameter.grad, DTensor)
        tensors = [parameter, parameter.grad, optimizer.state[parameter]["exp_avg"]]
        held += [weakref.ref(tensor._local_tensor.untyped_storage()) for tensor in tensors]
        held += [weakref.ref(tensor._local_tensor) for tensor in tensors]
        for tensor in tensors:
            tensor._local_tensor = torch.empty(0)
        del tensors, tensor
    gc.collect()  # of what other tests have left in this process
    assert [each() for each in held] == [None] * len(held)


@ranks(2)
def test_backward_sees_that_parameters_have_changed() -> None:
    model = Model()
    optimizer = model.base("AdamW")
    weight = model.weights[0]
    loss = (weight * weight).sum()
    model.set_gradients(0)
    step_on_shards(optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@ranks(2)
def test_torch_has_the_private_attributes() -> None:
    weight = Model().weights[0]
    assert isinstance(weight, DTensor)
    assert (weight._spec.mesh, weight._spec.placements) == (weight.device_mesh, weight.placements)
    assert type(weight._local_tensor) is Tensor


def compare(layout: str, base: str, options: dict[str, Any]) -> None:
    """A run equals one without local shards, and its base steps on plain tensors alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manic.mechanic, "step_on_shards", lambda base: base.step())
        expected = train(layout, base, 5, options=options)
    seen: list[str] = []

    def noted(base: Optimizer) -> None:
        with Operations() as log:
            step_on_shards(base)
        seen.extend(log.on_dtensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manic.mechanic, "step_on_shards", noted)
        found = train(layout, base, 5, options=options)
    assert seen == []
    assert found.scale == expected.scale
    assert found.metrics == expected.metrics
    for name, value in expected.parameters.items():
        assert torch.equal(found.parameters[name], value), name


@pytest.mark.parametrize(("layout", "world_size"), [
    ("fsdp2", 3), ("hsdp", 4), ("tp", 2), ("tp+fsdp2", 4), ("mixed", 2),
])  # fmt: skip
def test_layouts(layout: str, world_size: int) -> None:
    run(compare, world_size, layout, "adamw", {})


@pytest.mark.parametrize("options", [
    {"variant": "multiplicative"}, {"variant": "pytorch"}, {"store_delta": False}, {"update": "snapshot"},
    {"nonfinite": "ignore"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("base", ["adamw-fused", "sgd", "asgd"])
def test_captures(base: str, options: dict[str, Any]) -> None:
    run(compare, 2, "fsdp2", base, options)
