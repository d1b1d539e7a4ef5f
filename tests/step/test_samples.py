"""Early sums over a sample: the same elements in every layout, and every gradient is still seen by the guard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from manic import Mechanic
from manic.checkpoint.checkpointer import Checkpointer
from manic.distributed import sample
from manic.step.guard import Nonfinite, NonfiniteError
from manic.testing import run
from manic.tuners.multiplicative import Multiplicative


class Resting(Multiplicative):
    """The tuner, with rests that a test reaches."""

    name = "resting"
    rests = (5, 3)


WIDTH = 512
"""Two matrices of this width are sampled, and the vectors are not."""


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def train(module: nn.Module, optimizer: Mechanic, steps: int, batch: slice = slice(None)) -> list[float]:
    scales = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, WIDTH, generator=generator)
        optimizer.zero_grad()
        (module(x[batch]) - x[batch].roll(1, dims=1)).square().mean().backward()
        optimizer.step()
        scales.append(float(optimizer.scale))
    return scales


def adamw(module: nn.Module, **options: Any) -> Mechanic:
    return Mechanic(torch.optim.AdamW(module.parameters(), lr=1.0, weight_decay=0.1, fused=True), **options)


class TestWhichElements:
    def test_are_whole_runs_of_columns(self) -> None:
        x = torch.arange(3 * 1024).view(3, 1024)
        columns = sample.sample_of(x, 1024).reshape(3, -1)[0].tolist()
        assert columns == [*range(32), *range(512, 544)]

    def test_of_a_width_that_has_half_periods(self) -> None:
        x = torch.arange(2 * 768).view(2, 768)
        columns = sample.sample_of(x, 768).reshape(2, -1)[0].tolist()
        assert columns == [*range(16), *range(256, 272), *range(512, 528)]

    @pytest.mark.parametrize(
        ("shape", "expected"),
        [
            ((512, 512), True),
            ((1024, 256), True),
            ((2, 256, 512), True),
            ((511, 512), False),  # too few elements
            ((512, 640), False),  # no whole periods
            ((512 * 512,), False),  # no columns
        ],
    )
    def test_of_which_shapes(self, shape: tuple[int, ...], expected: bool) -> None:
        assert sample.is_sampled(torch.empty(shape)) is expected

    def test_a_copy_has_the_shape_of_a_sixteenth(self) -> None:
        x = torch.randn(2, 256, 512)
        copy = sample.copy_of_sample(x, torch.float32)
        assert copy.shape == sample.sample_shape(x.shape) == (2, 256, 32)
        assert torch.equal(copy, x[..., :32])


class TestOneProcess:
    def test_references_are_of_the_sample_where_nothing_else_keeps_x(self) -> None:
        module = model()
        optimizer = adamw(module)
        train(module, optimizer, 2)
        for parameter in module.parameters():
            state = optimizer.state[parameter]
            references = {name for name in state if name.startswith("mechanic_x_ref")}
            assert len(references) == 2
            shape = (WIDTH, WIDTH // 16) if parameter.dim() == 2 else parameter.shape
            assert {state[name].shape for name in references} == {shape}

    @pytest.mark.parametrize("options", [{"store_delta": True}, {"variant": "optax"}])
    def test_they_are_whole_where_x_is_made_of_them(self, options: dict[str, Any]) -> None:
        module = model()
        optimizer = adamw(module, **options)
        train(module, optimizer, 2)
        for parameter in module.parameters():
            assert optimizer.state[parameter]["mechanic_x_ref"].shape == parameter.shape

    def test_the_scale_is_near_that_of_all_elements(self, monkeypatch: pytest.MonkeyPatch) -> None:
        of_sample = train(module := model(), adamw(module), 60)
        monkeypatch.setattr(sample, "SMALLEST", WIDTH * WIDTH + 1)
        of_all = train(module := model(), adamw(module), 60)
        assert of_sample != of_all
        assert of_sample == pytest.approx(of_all, rel=0.3)

    @pytest.mark.parametrize("column", [0, 100])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_gradient_outside_of_the_sample_is_seen(self, column: int, value: float) -> None:
        module = model()
        optimizer = adamw(module)
        train(module, optimizer, 3)
        before = [parameter.detach().clone() for parameter in module.parameters()]
        gradient = module[0].weight.grad
        assert isinstance(gradient, Tensor)
        gradient[7, column] = value
        with pytest.raises(NonfiniteError, match="1 of 262144 local elements of the gradient"):
            optimizer.step()
        assert all(torch.equal(old, new) for old, new in zip(before, module.parameters()))

    def test_a_parameter_outside_of_the_sample_is_no_reason_to_skip(self) -> None:
        module = model()
        optimizer = adamw(module, nonfinite="skip")
        train(module, optimizer, 3)
        with torch.no_grad():
            module[0].weight[7, 100] = float("nan")
        with pytest.raises(NonfiniteError, match="of the value"):  # at the latest in the step after it
            train(module, optimizer, 2)

    def test_huge_gradients_are_no_infinite_ones(self) -> None:
        module = model()
        optimizer = adamw(module)
        train(module, optimizer, 3)
        for parameter in module.parameters():
            assert parameter.grad is not None
            parameter.grad.fill_(1e25)
        optimizer.step()
        assert int(optimizer.metrics()["nonfinite_steps"]) == 0


class TestKnownNorm:
    def step(self, **arguments: Any) -> tuple[nn.Module, Mechanic]:
        module = model()
        optimizer = adamw(module)
        train(module, optimizer, 3)
        optimizer.step(**arguments)
        return module, optimizer

    @pytest.mark.parametrize("norm", [1.0, torch.tensor(1.0)])
    def test_changes_nothing_where_it_is_finite(self, norm: Any) -> None:
        (one, first), (other, second) = self.step(), self.step(grad_norm=norm)
        assert float(first.scale) == float(second.scale)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))

    @pytest.mark.parametrize("norm", [float("nan"), torch.tensor(float("inf"))])
    def test_is_believed_where_it_is_not(self, norm: Any) -> None:
        with pytest.raises(NonfiniteError):
            self.step(grad_norm=norm)


def _fsdp(mesh: DeviceMesh) -> nn.Module:
    module = model()
    for layer in module:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def _columns(mesh: DeviceMesh) -> nn.Module:
    """Both matrices split along their columns, of which each rank has a whole period."""
    module = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH, bias=False))
    torch.manual_seed(1)
    whole = torch.randn(WIDTH, 2 * WIDTH) / WIDTH**0.5
    module[0].weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(1)]))
    return module


def _scales_of_fsdp(rank: int, steps: int) -> list[float]:
    mesh = init_device_mesh("cpu", (2,))
    module = _fsdp(mesh)
    optimizer = adamw(module)
    scales = train(module, optimizer, steps, slice(4 * rank, 4 * rank + 4))
    for parameter in module.parameters():
        reference = optimizer.state[parameter]["mechanic_x_ref"]
        assert isinstance(reference, DTensor)
        assert reference.placements == parameter.placements  # type: ignore[attr-defined]
        assert reference.shape == ((WIDTH, WIDTH // 16) if parameter.dim() == 2 else parameter.shape)
    return scales


def _fsdp_job(steps: int) -> list[float]:
    return _scales_of_fsdp(torch.distributed.get_rank(), steps)


def test_fsdp_has_the_scale_of_one_process() -> None:
    expected = train(module := model(), adamw(module), 8)
    for scales in run(_fsdp_job, 2, 8, timeout=120):
        assert scales == pytest.approx(expected, rel=1e-4)


def _tensor_parallel_job() -> tuple[list[float], bool]:
    mesh = init_device_mesh("cpu", (2,))
    weights = [_columns(mesh)[0].weight, nn.Parameter(_columns(mesh)[0].weight.full_tensor())]
    scales = []
    for weight in weights:
        optimizer = Mechanic(torch.optim.AdamW([weight], lr=1.0, fused=True))
        for step in range(6):
            gradient = torch.randn(WIDTH, 2 * WIDTH, generator=torch.Generator().manual_seed(step))
            is_sharded = isinstance(weight, DTensor)
            weight.grad = distribute_tensor(gradient, mesh, [Shard(1)]) if is_sharded else gradient
            optimizer.step()
        scales.append(float(optimizer.scale))
    narrow = distribute_tensor(torch.randn(2 * WIDTH, WIDTH), mesh, [Shard(1)])
    return scales, sample.is_sampled(narrow)


def test_columns_may_be_split_where_periods_begin() -> None:
    for (sharded, whole), narrow_is_sampled in run(_tensor_parallel_job, 2, timeout=120):
        assert sharded == pytest.approx(whole, rel=1e-6)
        assert not narrow_is_sampled


def _unlike_ranks_job(nonfinite: Nonfinite, bad_rank: int | None, known: float | None) -> list[float]:
    """Rank 0 has a matrix that is sampled, rank 1 none; the tuner rests early."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    parameter = nn.Parameter(torch.randn(WIDTH, WIDTH) if rank == 0 else torch.randn(8))
    base = torch.optim.AdamW([parameter], lr=1.0, fused=True)
    optimizer = Mechanic(base, variant=Resting(), plain="sharded", nonfinite=nonfinite)
    scales = []
    for step in range(9):
        gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        if step >= 7 and rank == bad_rank:
            gradient.view(-1)[-1] = float("nan")
        parameter.grad = gradient
        optimizer.step(**({} if known is None or rank else {"grad_norm": known}))
        scales.append(float(optimizer.scale))
    return [*scales, float(optimizer.metrics()["nonfinite_steps"])]


@pytest.mark.parametrize("known", [None, 1.0])
@pytest.mark.parametrize("nonfinite", ["raise", "skip", "ignore"])
def test_ranks_may_hold_unlike_parameters(nonfinite: Nonfinite, known: float | None) -> None:
    one, other = run(_unlike_ranks_job, 2, nonfinite, None, known, timeout=120)
    assert one == other
    assert one[-1] == 0.0


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_gradient_on_one_of_unlike_ranks_is_seen_on_both(bad_rank: int) -> None:
    one, other = run(_unlike_ranks_job, 2, "skip", bad_rank, None, timeout=120)
    assert one == other
    assert one[-1] == 2.0


@pytest.mark.parametrize("steps", [0, 3])
def test_a_step_that_raises_leaves_x_where_it_was(steps: int) -> None:
    module = model()
    optimizer = adamw(module)
    train(module, optimizer, steps)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    scale, base_step = float(optimizer.scale), optimizer.optimizers[0].step

    def fail() -> None:
        base_step()
        raise RuntimeError("after the base step")

    optimizer.optimizers[0].step = fail  # type: ignore[assignment, method-assign]
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RuntimeError, match="after the base step"):
        optimizer.step()
    assert float(optimizer.scale) == scale
    if steps == 0:  # afterwards S is in the learning rate, and x is where the base optimizer has left it
        assert all(torch.equal(old, new) for old, new in zip(before, module.parameters()))


def _save_job(path: str, steps: int) -> list[float]:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    module = _fsdp(mesh)
    optimizer = adamw(module)
    rank = torch.distributed.get_rank()
    train(module, optimizer, steps, slice(4 * rank, 4 * rank + 4))
    Checkpointer(path, module, optimizer).save(steps)
    return train(module, optimizer, 4, slice(4 * rank, 4 * rank + 4))


def _resume_job(path: str) -> list[float]:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    module = _fsdp(mesh)
    optimizer = adamw(module)
    Checkpointer(path, module, optimizer).load()
    size = 8 // torch.distributed.get_world_size()
    rank = torch.distributed.get_rank()
    return train(module, optimizer, 4, slice(size * rank, size * rank + size))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_checkpoint_is_read_on_any_number_of_ranks(tmp_path: Path, ranks: int) -> None:
    expected = run(_save_job, 2, str(tmp_path), 3, timeout=120)[0]
    for scales in run(_resume_job, ranks, str(tmp_path), timeout=120):
        assert scales == (expected if ranks == 2 else pytest.approx(expected, rel=1e-4))


def test_a_state_with_whole_references_is_read() -> None:
    module = model()
    whole = adamw(module)
    state = whole.state_dict()
    train(module, whole, 3)
    state = whole.state_dict()
    sampled_before = {key: dict(value) for key, value in state["state"].items()}
    for parameter, entries in zip(module.parameters(), state["state"].values()):
        for name in [name for name in entries if name.startswith("mechanic_x_ref")]:
            if parameter.dim() == 2:
                full = torch.zeros_like(parameter)
                sample.sample_of(full, WIDTH).copy_(entries[name].view(WIDTH, 1, 32))
                entries[name] = full
    copy = adamw(module)
    copy.load_state_dict(state)
    train(module, copy, 1)
    assert set(sampled_before) == set(state["state"])
    weight = module[0].weight
    assert copy.state[weight]["mechanic_x_ref"].shape == (WIDTH, WIDTH // 16)


def test_a_state_of_samples_is_refused_where_all_is_needed() -> None:
    module = model()
    optimizer = adamw(module)
    train(module, optimizer, 3)
    other = adamw(module, store_delta=True)
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="of a sample"):
        train(module, other, 1)
