"""Lightning: the callback gives S and S * lr to loggers and the progress bar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manic

pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import Logger

STEPS = 6


class Kept(Logger):
    """A logger that keeps what it is given."""

    name, version = "kept", 0

    def __init__(self) -> None:
        self.logs: list[tuple[dict[str, float], int]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.logs.append((metrics, step))

    def log_hyperparams(self, *_: Any) -> None: ...


class Net(pl.LightningModule):
    def __init__(self, optimizers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 4) for _ in range(optimizers))
        self.automatic_optimization = optimizers == 1
        self.seen: list[list[tuple[float, float]]] = []

    def training_step(self, batch: list[Tensor]) -> Tensor | None:
        (x,) = batch
        losses = [(layer(x) - x[:, :4].sin()).square().mean() for layer in self.layers]
        if self.automatic_optimization:
            return losses[0]
        for optimizer, scheduler, loss in zip(self.optimizers(), self.lr_schedulers(), losses, strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            scheduler.step()
        return None

    def on_train_batch_end(self, *_: Any) -> None:
        """The schedule has gone on."""
        lr = 0.5 / (1 + len(self.seen))
        self.seen.append([(manic.unwrap(each).scale.item(), lr) for each in self.trainer.optimizers])

    def configure_optimizers(self) -> Any:
        optimizers = [manic.AdamW(layer.parameters(), lr=0.5) for layer in self.layers]
        schedulers = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: 1 / (1 + step)) for each in optimizers]
        return optimizers, [{"scheduler": each, "interval": "step"} for each in schedulers]


def fit(folder: Path, optimizers: int) -> tuple[Net, Kept, Any]:
    from manic.integrations.lightning import MechanicCallback

    model, logger = Net(optimizers), Kept()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=STEPS * optimizers, logger=logger, log_every_n_steps=1, default_root_dir=folder,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[MechanicCallback(prog_bar=True)],
    )  # fmt: skip
    data = torch.utils.data.TensorDataset(torch.randn(STEPS * 4, 8, generator=torch.Generator().manual_seed(1)))
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4))
    return model, logger, trainer


@pytest.mark.framework("Lightning", "Callback: S and S * lr in loggers and the progress bar")
@pytest.mark.parametrize("optimizers", [1, 2])
def test_loggers_get_the_effective_learning_rate(optimizers: int, tmp_path: Path) -> None:
    model, logger, trainer = fit(tmp_path, optimizers)
    logged = [values for values, _ in logger.logs if "scale" in values]
    assert len(logged) == len(model.seen) == STEPS
    for values, seen in zip(logged, model.seen, strict=True):
        for end, (scale, lr) in zip(("", "-1"), seen):
            assert values[f"effective_lr/0{end}"] == pytest.approx(scale * lr, rel=1e-6)
            assert values[f"scale{end}"] == pytest.approx(scale, rel=1e-6)
    assert trainer.progress_bar_metrics.keys() >= {"scale", "effective_lr/0"}
    assert "grad_norm" not in trainer.progress_bar_metrics
