"""Loss scaling: an overflow on one rank skips the step on all, and scaled gradients never reach the tuner.

Torch's ``GradScaler`` detects overflows in the gradients of its own rank; if ranks disagree, only some of them step.
These tests record the layouts in which that happens; ``ShardedGradScaler`` works in all of them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from manic import Mechanic
from manic.testing import ranks, run
from support.layouts import BATCH, Setup, batch, make_net, setup, train

STEPS = 5
OVERFLOWS = (0, 3)
FACTOR = 2.0**10
S_INIT = 1e-2
# Layouts whose gradients are equal on all ranks before the scaler reads them, or DTensors, which it reduces over their
# mesh. DDP on two ranks: it sums in another order from the second backward on, and more ranks would round differently.
BY_TORCH = [("single", 1), ("ddp", 2), ("zero1", 2), ("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4), ("tp+fsdp2", 4)]
ALL = [
    *BY_TORCH, ("fsdp1-orig", 2), ("fsdp1-orig", 3), ("fsdp1-flat", 4), ("fsdp1-hybrid", 4), ("pipeline", 4),
]  # fmt: skip


def make_scaler(kind: str, **options: Any) -> torch.amp.GradScaler:
    options = {"init_scale": FACTOR, **options}
    if kind == "sharded":  # its default is the group of the time of its import
        return ShardedGradScaler("cpu", process_group=dist.group.WORLD, **options)
    return torch.amp.GradScaler("cpu", **options)


def local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def copy_state(setup_: Setup) -> list[Tensor]:
    """Copies of this rank's x, x_ref, Delta, base optimizer's state, and tuner."""
    mechanic = setup_.mechanic
    tensors = [group[mechanic.GROUP_KEY] for group in mechanic.param_groups]
    for parameter in (p for group in mechanic.param_groups for p in group["params"]):
        state = mechanic.state.get(parameter, {})
        tensors += [parameter, *(value for _, value in sorted(state.items()) if isinstance(value, Tensor))]
    return [local(tensor).clone() for tensor in tensors]


def overflow(setup_: Setup) -> None:
    """Make one element of this rank's gradients infinite."""
    held = [p.grad for group in setup_.mechanic.param_groups for p in group["params"] if p.grad is not None]
    next(local(gradient) for gradient in held if local(gradient).numel()).view(-1)[0] = torch.inf


def backward(setup_: Setup, step: int, scaler: torch.amp.GradScaler) -> None:
    x, y = batch(step, torch.float32)
    share = BATCH // setup_.data_size
    part = slice(setup_.data_rank * share, (setup_.data_rank + 1) * share)
    setup_.optimizer.zero_grad()
    scaler.scale((setup_.model(x[part]) - y[part]).square().mean()).backward()


def train_scaled(
    layout: str, base: str, kind: str, overflowing: tuple[int, ...], options: dict[str, Any]
) -> tuple[float, dict[str, Tensor], list[float]]:
    """Train as :func:`layouts.train` does, with a scaler, and with overflows in between."""
    setup_ = setup(layout, base, torch.float32, **options)
    scaler = make_scaler(kind, growth_interval=2)
    mine = dist.get_rank() in overflowing
    factors = []
    for step in range(STEPS):
        if step in OVERFLOWS:
            if layout in ("ddp", "zero1"):  # before DDP averages, so that the overflow reaches all ranks
                weight = next(p for name, p in setup_.model.named_parameters() if name == "module.down.weight")
                hook = weight.register_hook(lambda g: g.index_fill(0, torch.tensor([3]), torch.inf) if mine else g)
                backward(setup_, step, scaler)
                hook.remove()
            else:
                backward(setup_, step, scaler)
                if mine:
                    overflow(setup_)
            before, factor = copy_state(setup_), scaler.get_scale()
            scaler.step(setup_.optimizer)
            scaler.update()
            after = copy_state(setup_)
            assert len(after) == len(before)
            assert all(torch.equal(a, b) for a, b in zip(after, before)), "the skipped step has changed the state"
            assert scaler.get_scale() == factor / 2, "the overflow was not detected"
        backward(setup_, step, scaler)
        scaler.step(setup_.optimizer)
        scaler.update()
        factors.append(scaler.get_scale())
    return setup_.mechanic.scale.item(), setup_.gather(), factors


def assert_equals_unscaled(
    layout: str, world_size: int, kind: str, overflowing: tuple[int, ...], base: str = "adamw", **options: Any
) -> None:
    options = {"s_init": S_INIT, **options}
    expected = run(train, world_size, layout, base, STEPS, torch.float32, options)
    start = dict(make_net(torch.float32).named_parameters())
    for plain, scaled in zip(expected, run(train_scaled, world_size, layout, base, kind, overflowing, options)):
        scale, parameters, factors = scaled
        # Halved at steps 0 and 3, doubled after two steps without an overflow.
        assert factors == [512.0, 1024.0, 1024.0, 512.0, 1024.0]
        assert scale == plain.scale != S_INIT  # factors are powers of two, so scaling does not round
        for name, value in plain.parameters.items():
            assert torch.equal(parameters[name], value), name
        assert any(float((value - start[name]).detach().abs().max()) > 0.01 for name, value in parameters.items())


@pytest.mark.parametrize(("layout", "world_size"), BY_TORCH)
def test_grad_scaler(layout: str, world_size: int) -> None:
    # Replicas of a shard overflow together, because their gradients are averaged before.
    overflowing = (1, 3) if layout == "hsdp" else (world_size - 1,)
    assert_equals_unscaled(layout, world_size, "plain", overflowing)


@pytest.mark.parametrize(("layout", "world_size"), ALL)
def test_sharded_grad_scaler(layout: str, world_size: int) -> None:
    assert_equals_unscaled(layout, world_size, "sharded", (world_size - 1,))


@pytest.mark.parametrize(("base", "options"), [
    ("adamw-fused", {}),  # would unscale gradients itself if Mechanic declared support
    ("sgd", {}),
    ("asgd", {}),
    ("adamw", {"variant": "pytorch"}),
    ("adamw", {"variant": "multiplicative"}),
    ("adamw", {"store_delta": False}),
], ids=str)  # fmt: skip
def test_every_update_rule(base: str, options: dict[str, Any]) -> None:
    assert_equals_unscaled("fsdp2", 2, "plain", (0,), base, **options)


def factor_after_an_overflow(layout: str, kind: str, overflowing: tuple[int, ...], reverse: bool = False) -> float:
    setup_ = setup(layout, "adamw", torch.float32, s_init=S_INIT)
    if reverse:
        for group in setup_.mechanic.param_groups:
            group["params"].reverse()
    scaler = make_scaler(kind)
    backward(setup_, 0, scaler)
    if dist.get_rank() in overflowing:
        overflow(setup_)
    scaler.unscale_(setup_.optimizer)
    scaler.update()
    return scaler.get_scale()


@pytest.mark.parametrize(("layout", "world_size", "reverse"), [
    ("fsdp1-orig", 2, False),
    ("fsdp1-flat", 2, False),
    ("pipeline", 4, False),
    # The scaler reduces over the mesh and placements of the first gradient: here the last layer's, which all tensor
    # parallel ranks hold.
    ("tp+fsdp2", 4, True),
])  # fmt: skip
def test_unsharded_scaler_makes_ranks_disagree(layout: str, world_size: int, reverse: bool) -> None:
    # If the first assertion fails, torch makes ranks agree: update docs/low-precision.md.
    last = (world_size - 1,)
    assert set(run(factor_after_an_overflow, world_size, layout, "plain", last, reverse)) == {FACTOR, FACTOR / 2}
    assert set(run(factor_after_an_overflow, world_size, layout, "sharded", last, reverse)) == {FACTOR / 2}


@ranks(2)
@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_torch_refuses_plain_tensors_among_dtensors(kind: str) -> None:
    setup_ = setup("tp", "adamw", torch.float32, s_init=S_INIT)
    scaler = make_scaler(kind)
    backward(setup_, 0, scaler)
    before = copy_state(setup_)
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        scaler.step(setup_.optimizer)
    assert all(torch.equal(a, b) for a, b in zip(copy_state(setup_), before))


@ranks(2)
def test_tensor_parallel_with_every_parameter_on_the_mesh() -> None:
    model = make_net(torch.float32)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    for child in (model.norm, model.head, model.frozen):
        distribute_module(child, mesh, input_fn=_to_mesh, output_fn=_from_mesh)  # type: ignore[arg-type]
    mechanic = Mechanic(torch.optim.AdamW(model.parameters(), lr=1.0), s_init=S_INIT, variant="optax")
    setup_ = Setup(model, mechanic, mechanic, 0, 1, dict)
    scaler = make_scaler("sharded")
    for step in range(3):
        backward(setup_, step, scaler)
        if step == 1 and dist.get_rank() == 1:
            overflow(setup_)
        before = copy_state(setup_)
        scaler.step(mechanic)
        scaler.update()
        changed = len(before) != len(copy_state(setup_)) or any(
            not torch.equal(a, b) for a, b in zip(copy_state(setup_), before)
        )
        assert changed is (step != 1)
    assert scaler.get_scale() == FACTOR / 2


def _to_mesh(module: nn.Module, inputs: tuple[Any, ...], mesh: Any) -> tuple[Any, ...]:
    first = inputs[0]
    return (first if isinstance(first, DTensor) else DTensor.from_local(first, mesh, [Replicate()]), *inputs[1:])


def _from_mesh(module: nn.Module, output: Any, mesh: Any) -> Tensor:
    local_output: Tensor = output.to_local()
    return local_output


def train_in_float16(layout: str) -> tuple[list[bool], float, float, list[float]]:
    """Train in float16 with a far too high initial factor: which steps were taken, S, the factor, and losses."""
    model: nn.Module = make_net(torch.float32)
    if layout == "fsdp2":
        policy = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float16)
        fully_shard(model, mp_policy=policy)
    else:
        model = nn.parallel.DistributedDataParallel(model)
    mechanic = Mechanic(torch.optim.AdamW(model.parameters(), lr=1.0), s_init=S_INIT, variant="optax")
    scaler = make_scaler("sharded", init_scale=2.0**26)
    taken: list[int] = []
    mechanic.register_step_post_hook(lambda *_: taken.append(step))
    losses = []
    for step in range(30):
        x, y = batch(step % 4, torch.float32)
        part = slice(dist.get_rank() * BATCH // 2, (dist.get_rank() + 1) * BATCH // 2)
        mechanic.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=layout == "ddp"):
            loss = (model(x[part]).float() - y[part]).square().mean()
        scaler.scale(loss).backward()
        scaler.step(mechanic)
        scaler.update()
        losses.append(loss.item())
    return [step in taken for step in range(30)], mechanic.scale.item(), scaler.get_scale(), losses


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_float16_scaler_finds_its_factor(layout: str) -> None:
    (taken, scale, factor, losses), (taken_b, scale_b, factor_b, other_losses) = run(train_in_float16, 2, layout)
    assert (taken, scale, factor) == (taken_b, scale_b, factor_b)
    skipped = taken.count(False)
    assert not taken[0]
    assert 1 <= skipped <= 20
    assert factor == 2.0 ** (26 - skipped)
    assert scale > S_INIT
    assert losses[-4:] < losses[:4]
    assert sum(losses[-4:] + other_losses[-4:]) < 0.8 * sum(losses[:4] + other_losses[:4])
