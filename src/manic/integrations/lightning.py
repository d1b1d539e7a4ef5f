"""Lightning: Mechanic's metrics in the loggers and the progress bar."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from manic.optimizer.kinds import learning_rate
from manic.unwrap import mechanics

__all__ = ["MechanicCallback"]


class MechanicCallback(Callback):
    """Logs S, the effective learning rates and the rest of Mechanic's metrics, by ``log_dict``.

    Nothing waits for the device but the loggers, every ``log_every_n_steps``. With several Mechanics the names of the
    second and further ones end in ``-1`` and so on.

    Args:
        prog_bar: Whether S and the effective learning rates are shown in the progress bar, too.
        prefix: What comes before the metrics' names.
    """

    def __init__(self, prog_bar: bool = False, prefix: str = "") -> None:
        self._prog_bar, self._prefix = prog_bar, prefix
        self._lrs: dict[int, list[Any]] = {}  # of the last step of each optimizer, by its id

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Keep the learning rates: the schedule has gone on before the metrics are logged."""
        for mechanic in mechanics(optimizer):
            lrs = map(learning_rate, mechanic.param_groups)
            self._lrs[id(mechanic)] = [lr.clone() if isinstance(lr, Tensor) else lr for lr in lrs]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the metrics of the last step."""
        for index, mechanic in enumerate(mechanics(trainer.optimizers)):
            end = f"-{index}" if index else ""
            metrics = mechanic.metrics()
            for group, lr in enumerate(self._lrs.get(id(mechanic), ())):
                scale = metrics["scale"] if "scale" in metrics else metrics[f"scale/{group}"]
                metrics[f"effective_lr/{group}"] = scale * lr
            for name, value in metrics.items():
                shown = self._prog_bar and name.startswith(("scale", "effective_lr"))
                self.log(f"{self._prefix}{name}{end}", value, on_step=True, on_epoch=False, prog_bar=shown)
