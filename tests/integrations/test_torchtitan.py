"""torchtitan's optimizer container, schedulers and checkpoint manager with the real package: one scale, kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from manic import Mechanic
from manic.testing import run
from support.pages import run_page
from support.torchrun import by_path, run_example

pytest.importorskip("torchtitan", reason="torchtitan is not installed")

from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.optimizer import LRSchedulersContainer, ParamGroupConfig

from manic.integrations.torchtitan import MechanicContainer

STEPS = 12
SAVED = 5
BATCH = 24
GROUPS = {r"bias$": {"lr": 0.5, "weight_decay": 0.0}, r".*": {"lr": 1.0, "weight_decay": 0.1}}


class Part(nn.Module):
    """A stage of a pipeline, with the names that its layers have in the whole model."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x).tanh()
        return x


def make() -> list[Part]:
    torch.manual_seed(0)
    return [Part({"0": nn.Linear(8, 32), "1": nn.Linear(32, 32)}), Part({"2": nn.Linear(32, 4)})]


def sharded(mesh: Any = None) -> list[Part]:
    """Two parts, in FSDP2 over all ranks, or over those of a mesh."""
    parts = make()
    for part in parts:
        for layer in part.layers.values():
            fully_shard(layer, mesh=mesh)
        fully_shard(part, mesh=mesh)
    return parts


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(step))
    return x, x[:, :4].sin()


class Job:
    """What torchtitan's trainer has: model parts, optimizers, schedulers and a checkpoint manager.

    Args:
        parts: The whole model on this rank.
        owned: Those that this rank trains.
        options: Mechanic's.
    """

    def __init__(self, parts: list[Part], owned: list[Part] | None = None, **options: Any) -> None:
        self.parts = parts
        groups = [
            ParamGroupConfig(pattern=pattern, optimizer_name="AdamW", optimizer_kwargs=kwargs)
            for pattern, kwargs in GROUPS.items()
        ]
        config = MechanicContainer.Config(param_groups=groups, mechanic=options)
        self.optimizers = config.build(model_parts=owned or parts)
        schedule = LRSchedulersContainer.Config(warmup_steps=3, decay_type="cosine")
        self.schedulers = schedule.build(optimizers=self.optimizers, training_steps=STEPS)
        self.step = 0

    def manager(self, folder: Path, **options: Any) -> CheckpointManager:
        config = CheckpointManager.Config(
            enable=True, folder=str(folder), interval=1, keep_latest_k=0, last_save_model_only=False, **options
        )
        return CheckpointManager(
            config, dataloader=None, model_parts=self.parts, optimizers=self.optimizers,
            lr_schedulers=self.schedulers, states={"train_state": self}, sd_adapter=None,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def train(self, last: int, share: slice = slice(None)) -> list[float]:
        scales = []
        while self.step < last:
            self.optimizers.zero_grad()
            x, y = batch(self.step)
            for part in self.parts:
                x = part(x) if part is not self.parts[0] else part(x[share])
            (x - y[share]).square().mean().backward()
            self.optimizers.step()
            self.schedulers.step()
            self.step += 1
            scales.append(self.optimizers.mechanic.scale.item())
        return scales


def share_of_rank() -> slice:
    rank, size = dist.get_rank(), BATCH // dist.get_world_size()
    return slice(rank * size, (rank + 1) * size)


def in_one_process() -> list[float]:
    """The scales without torchtitan."""
    alone = [dist.new_group([each]) for each in range(dist.get_world_size())][dist.get_rank()]
    model = nn.Sequential(*make())
    named = list(model.named_parameters())
    biases, others = GROUPS.values()
    groups = [
        {"params": [p for name, p in named if name.endswith("bias")], **biases},
        {"params": [p for name, p in named if not name.endswith("bias")], **others},
    ]
    optimizer = Mechanic(torch.optim.AdamW(groups, fused=True), process_group=alone)
    lrs = [group["lr"] for group in groups]
    titan = Job(make(), process_group=alone).schedulers.schedulers[0].lr_lambdas[0]  # torchtitan's schedule
    scales = []
    for step in range(STEPS):
        for index, group in enumerate(optimizer.param_groups):
            group["lr"] = lrs[index] * titan(step)
        optimizer.zero_grad()
        x, y = batch(step)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        scales.append(optimizer.scale.item())
    return scales


def is_right(state_dict_first: bool) -> None:
    job = Job(sharded())
    if state_dict_first:
        assert job.optimizers.state_dict()  # takes a step with zero gradients
    assert job.train(STEPS, share_of_rank()) == pytest.approx(in_one_process(), rel=1e-4)
    metrics = job.schedulers.get_metrics()
    assert len(job.optimizers) == 1
    assert set(metrics) == {f"lr/Mechanic/{index}" for index in range(4)}
    assert metrics["lr/Mechanic/0"] == job.optimizers.mechanic.param_groups[0]["lr"]


@pytest.mark.framework("torchtitan", "FSDP2, two model parts on each rank: the scale of one process")
@pytest.mark.parametrize("state_dict_first", [False, True])
def test_two_model_parts(state_dict_first: bool) -> None:
    run(is_right, 2, state_dict_first)


def is_right_in_stages() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "fsdp"))
    parts = sharded(mesh["fsdp"])
    rank, size = mesh["fsdp"].get_local_rank(), BATCH // 2
    share = slice(rank * size, (rank + 1) * size)
    job = Job(parts, [parts[mesh["pp"].get_local_rank()]], pipeline_stages=2)
    other = Job(parts, [parts[1 - mesh["pp"].get_local_rank()]], pipeline_stages=2)  # as a schedule would send it here
    expected = in_one_process()
    for step in range(STEPS):
        for each in (job, other):
            each.optimizers.zero_grad()
        x, y = batch(step)
        (parts[1](parts[0](x[share])) - y[share]).square().mean().backward()
        for each in (job, other):
            each.optimizers.step()
            each.schedulers.step()
        assert job.optimizers.mechanic.scale.item() == pytest.approx(expected[step], rel=1e-4)


@pytest.mark.framework("torchtitan", "a pipeline of two stages, each in FSDP2 on two ranks: the scale of one process")
def test_pipeline_stages() -> None:
    run(is_right_in_stages, 4)


def refuses_stages() -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    parts = make()
    job = Job(parts, [parts[mesh["pp"].get_local_rank()]])
    with pytest.raises(ValueError, match="if a pipeline splits the model, pass pipeline_stages"):
        job.train(1)


@pytest.mark.framework("torchtitan", "a pipeline without `pipeline_stages`", limit="refused on all ranks")
def test_undeclared_stages() -> None:
    run(refuses_stages, 2)


def resumes(folder: Path, mode: str) -> None:
    share = share_of_rank()
    job = Job(sharded())
    manager = job.manager(folder, async_mode=mode)
    job.train(SAVED, share)
    assert manager.save(SAVED)
    expected, weights = job.train(STEPS, share), weights_of(job.parts)
    manager.maybe_wait_for_saving()
    manager.close()
    job = Job(sharded())
    assert job.manager(folder).load()
    assert job.step == SAVED
    assert job.train(STEPS, share) == expected
    assert all(map(torch.equal, weights_of(job.parts), weights))


def weights_of(parts: list[Part]) -> list[Tensor]:
    return [p.full_tensor().clone() for part in parts for p in part.parameters()]  # type: ignore[attr-defined]


@pytest.mark.framework("torchtitan", "its checkpoint manager, also asynchronous: a resumed run is equal bit for bit")
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_resumed_run_is_the_uninterrupted_one(mode: str, tmp_path: Path) -> None:
    run(resumes, 2, tmp_path, mode)


def saves(folder: Path) -> list[float]:
    job = Job(sharded())
    job.train(SAVED, share_of_rank())
    assert job.manager(folder).save(SAVED)
    return job.train(STEPS, share_of_rank())


def loads(folder: Path) -> list[float]:
    job = Job(sharded())
    assert job.manager(folder).load()
    return job.train(STEPS, share_of_rank())


@pytest.mark.framework("torchtitan", "a checkpoint loaded on another number of ranks: equal to rounding")
def test_other_ranks(tmp_path: Path) -> None:
    (expected, _) = run(saves, 2, tmp_path)
    for scales in run(loads, 3, tmp_path):
        assert scales == pytest.approx(expected, rel=1e-4)


def saved_by_example(folder: Path) -> dict[str, Any]:
    """What the example has saved, by name."""
    dcp_to_torch_save(folder / "checkpoint" / "step-10", folder / "saved.pt")
    return by_path(torch.load(folder / "saved.pt", weights_only=False))


@pytest.mark.framework("torchtitan", "launch/examples/torchtitan_container.py: trains, and resumes bit for bit")
def test_the_example(tmp_path: Path) -> None:
    run_example("torchtitan_container.py", tmp_path / "stopped", "--steps", "6")
    resumed = run_example("torchtitan_container.py", tmp_path / "stopped", "--steps", "10")
    whole = run_example("torchtitan_container.py", tmp_path / "whole", "--steps", "10")
    assert "resumed at step 6" in resumed
    assert re.search(r"step 10: loss [\d.]+, S [\d.e-]+, lr [\d.e-]+", whole)
    saved = saved_by_example(tmp_path / "whole")
    assert any("mechanic_x_ref" in name for name in saved)
    assert saved_by_example(tmp_path / "stopped") == saved


def runs_the_page() -> None:
    parts = sharded()
    names = run_page("frameworks-torchtitan", {"model_parts": parts, "steps": STEPS})
    for step in range(2):
        x, y = batch(step)
        names["optimizers"].zero_grad()
        (parts[1](parts[0](x)) - y).square().mean().backward()
        names["optimizers"].step()
        names["schedulers"].step()
    assert names["optimizers"].mechanic.scale.item() > 0.0


@pytest.mark.framework("torchtitan", "the lines of its page")
def test_the_page() -> None:
    run(runs_the_page, 2)
