"""Lightning's Trainer and Fabric with the real package: the scale of a plain loop, and a resume bit for bit."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from manic import Mechanic
from manic.testing import run, shutdown
from support.pages import run_page
from support.torchrun import run_example

pytest.importorskip("lightning", reason="Lightning is not installed")
import lightning as L
from lightning.fabric.strategies import DDPStrategy as DDPStrategyOfFabric
from lightning.fabric.strategies import ModelParallelStrategy as ModelParallelStrategyOfFabric
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

EPOCH, EPOCHS, ROWS = 8, 3, 8


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def batch(step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    x = x[rank::world]
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x.sum(1), x[:, 3]], 1)


def base(parameters: Any) -> Mechanic:
    return Mechanic(torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.1))


def schedule(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)


def plain(clip: float | None = None, accumulate: int = 1) -> tuple[float, Tensor]:
    """S and the parameters after a loop without Lightning, on one process."""
    model = net()
    optimizer = base(model.parameters())
    scheduler = schedule(optimizer)
    for step in range(EPOCH * EPOCHS // accumulate):
        optimizer.zero_grad()
        for part in range(accumulate):
            x, y = batch((step * accumulate + part) % EPOCH)
            (nn.functional.mse_loss(model(x), y) / accumulate).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
    return float(optimizer.scale), flat(model)


def flat(model: nn.Module) -> Tensor:
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in whole])


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.scales: list[float] = []

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(
            next(self.parameters()), DTensor
        ):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        optimizer = base(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step"}}

    def training_step(self, rows: tuple[Tensor, Tensor], index: int) -> Tensor:
        return nn.functional.mse_loss(self.net(rows[0]), rows[1])

    def on_train_batch_end(self, *_: Any) -> None:
        self.scales.append(float(self.optimizers().scale))


class Batches(torch.utils.data.IterableDataset[Any]):
    def __init__(self, count: int, rank: int = 0, world: int = 1) -> None:
        self.count, self.rank, self.world = count, rank, world

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (batch(step, self.rank, self.world) for step in range(self.count))


def fit(epochs: int, *, resume: Path | None = None, accumulate: int = 1, **options: Any) -> tuple[Module, Any]:
    """Train on the CPU; a run of some epochs is the beginning of one with more."""
    module = Module()
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, accumulate_grad_batches=accumulate,
        **{"devices": 1, "logger": False, **options},
    )  # fmt: skip
    rank, world = trainer.global_rank, trainer.world_size
    loader = torch.utils.data.DataLoader(Batches(EPOCH, rank, world), batch_size=None)
    trainer.fit(module, loader, ckpt_path=None if resume is None else str(resume))
    return module, trainer


CHANGES: list[dict[str, Any]] = [{}, {"clip": 0.1}, {"accumulate": 2}, {"clip": 0.1, "accumulate": 4}]


@pytest.mark.framework("Lightning Trainer", "the scale of a plain loop, with clipping and accumulation")
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_trainer_finds_the_scale_of_a_plain_loop(changes: dict[str, Any]) -> None:
    scale, parameters = plain(**changes)
    clip: dict[str, Any] = {"gradient_clip_val": changes["clip"]} if "clip" in changes else {}
    module, _ = fit(EPOCHS, accumulate=changes.get("accumulate", 1), **clip)
    assert module.scales[-1] == pytest.approx(scale, rel=1e-9)
    torch.testing.assert_close(flat(module), parameters, rtol=1e-9, atol=1e-12)


@pytest.mark.framework("Lightning Trainer", "resumes bit for bit")
def test_trainer_resumes_bit_for_bit(tmp_path: Path) -> None:
    _, trainer = fit(1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    resumed, _ = fit(EPOCHS, resume=tmp_path / "first.ckpt")
    whole, _ = fit(EPOCHS)
    assert torch.equal(flat(resumed), flat(whole))
    assert resumed.scales == whole.scales[-len(resumed.scales) :]


@pytest.mark.framework("Lightning Trainer", "LearningRateMonitor", limit="shows the base learning rate, not S * lr")
def test_learning_rate_monitor_shows_the_base_learning_rate(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    module, _ = fit(EPOCHS, logger=logger, log_every_n_steps=1, callbacks=[LearningRateMonitor("step")])
    logger.save()
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert rows[0].split(",")[0] == "lr-Mechanic"
    assert float(rows[1].split(",")[0]) == 1.0
    assert module.scales[0] < 0.1


def as_by_torchrun() -> None:
    """Set what torchrun sets for this rank."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(
        TORCHELASTIC_RUN_ID="test", RANK=rank, LOCAL_RANK=rank, GROUP_RANK="0", WORLD_SIZE=world,
        LOCAL_WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT="29500",
    )  # fmt: skip


@pytest.fixture
def _new_processes() -> Iterator[None]:
    """Lightning changes the environment of its processes."""
    shutdown()
    yield
    shutdown()


def train_on_ranks(layout: str, folder: str) -> tuple[list[float], list[float], float, Tensor, bool]:
    """The scales of a whole and of a resumed run; S and the parameters; whether the runs end alike bit for bit."""
    as_by_torchrun()
    warnings.simplefilter("ignore")

    def strategy() -> Any:
        if layout == "ddp":
            return DDPStrategy(process_group_backend="gloo")
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")

    options: dict[str, Any] = {"devices": 2, "gradient_clip_val": 0.1}
    path = Path(folder, "first.ckpt")
    _, trainer = fit(1, strategy=strategy(), **options)
    trainer.save_checkpoint(path)
    resumed, _ = fit(EPOCHS, resume=path, strategy=strategy(), **options)
    whole, _ = fit(EPOCHS, strategy=strategy(), **options)
    parameters = flat(whole)
    is_same = torch.equal(flat(resumed), parameters)
    return whole.scales, resumed.scales, whole.scales[-1], parameters, is_same


@pytest.mark.framework(
    "Lightning Trainer", "DDP and FSDP2 (ModelParallelStrategy), 2 ranks: scale of one process, resume"
)
@pytest.mark.usefixtures("_new_processes")
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_trainer_on_two_ranks(layout: str, tmp_path: Path) -> None:
    scale, parameters = plain(clip=0.1)
    for whole, resumed, last, found, is_same in run(train_on_ranks, 2, layout, str(tmp_path), timeout=280.0):
        assert last == pytest.approx(scale, rel=1e-9)
        torch.testing.assert_close(found, parameters, rtol=1e-9, atol=1e-12)
        assert resumed == whole[-len(resumed) :]
        assert is_same


def train_with_fabric(layout: str, folder: str) -> tuple[float, Tensor, bool]:
    """S and the parameters after a run with Fabric, and whether one that resumes ends alike."""
    as_by_torchrun()
    warnings.simplefilter("ignore")

    def shard(model: nn.Module, mesh: Any) -> nn.Module:
        fully_shard(model, mesh=mesh["data_parallel"])
        return model

    strategies = {
        "ddp": DDPStrategyOfFabric(process_group_backend="gloo"),
        "fsdp2": ModelParallelStrategyOfFabric(shard, data_parallel_size=2, tensor_parallel_size=1),
    }
    fabric = L.Fabric(accelerator="cpu", devices=2, strategy=strategies[layout])
    fabric.launch()

    def train(steps: range, resume: bool = False) -> tuple[nn.Module, Any]:
        model = fabric.setup_module(net())
        mechanic = base(model.parameters())
        optimizer, scheduler = fabric.setup_optimizers(mechanic), schedule(mechanic)
        state = {"model": model, "optimizer": optimizer, "scheduler": scheduler.state_dict()}
        if resume:
            fabric.load(Path(folder, "checkpoint"), state)
            scheduler.load_state_dict(state["scheduler"])  # under FSDP2 Fabric leaves that to its user
        for step in steps:
            optimizer.zero_grad()
            for part in range(2):
                with fabric.no_backward_sync(model, enabled=part == 0):
                    x, y = batch((2 * step + part) % EPOCH, fabric.global_rank, 2)
                    fabric.backward(nn.functional.mse_loss(model(x), y) / 2)
            fabric.clip_gradients(model, optimizer, max_norm=0.1)
            optimizer.step()
            scheduler.step()
        if steps.stop == 5:
            fabric.save(Path(folder, "checkpoint"), {**state, "scheduler": scheduler.state_dict()})
        assert float(optimizer.scale) == float(mechanic.scale)
        return model, mechanic

    train(range(5))
    resumed, _ = train(range(5, 12), resume=True)
    whole, mechanic = train(range(12))
    return float(mechanic.scale), flat(whole), torch.equal(flat(whole), flat(resumed))


@pytest.mark.framework(
    "Lightning Fabric", "DDP and FSDP2, 2 ranks: scale of one process, clipping, accumulation, resume"
)
@pytest.mark.usefixtures("_new_processes")
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_fabric_on_two_ranks(layout: str, tmp_path: Path) -> None:
    scale, parameters = plain(clip=0.1, accumulate=2)
    for found, there, is_same in run(train_with_fabric, 2, layout, str(tmp_path), timeout=280.0):
        assert found == pytest.approx(scale, rel=1e-9)
        torch.testing.assert_close(there, parameters, rtol=1e-9, atol=1e-12)
        assert is_same


@pytest.mark.framework("Lightning Fabric", "the example launch/examples/lightning_fabric.py resumes bit for bit")
@pytest.mark.timeout(900)  # it calls torchrun three times
def test_the_example_resumes_bit_for_bit(tmp_path: Path) -> None:
    run_example("lightning_fabric.py", tmp_path / "parts", "--steps", "4")
    resumed = run_example("lightning_fabric.py", tmp_path / "parts", "--steps", "8")
    assert "resumed at step 4" in resumed
    assert re.search(r"step +8 .* S \S+ +effective lr \S+", resumed)
    run_example("lightning_fabric.py", tmp_path / "whole", "--steps", "8")
    ends = []
    for name in ("parts", "whole"):
        dcp_to_torch_save(tmp_path / name / "step_000008", tmp_path / f"{name}.pt")
        ends.append(torch.load(tmp_path / f"{name}.pt", weights_only=False))
    for find in (
        lambda end: end["model"], lambda end: end["optimizer"]["state"],
        lambda end: end["optimizer"]["param_groups"][0]["mechanic"],
    ):  # fmt: skip
        torch.testing.assert_close(find(ends[0]), find(ends[1]), rtol=0.0, atol=0.0)


@pytest.mark.framework("Lightning", "the lines of its page")
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("frameworks-lightning", {"torch": torch, "Mechanic": Mechanic})
    assert float(names["mechanic"].scale) > 0.0
    assert "effective_lr" in next(tmp_path.rglob("metrics.csv")).read_text()
