"""Lightning: Mechanic's metrics in the loggers and the progress bar."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

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

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the metrics of the last step."""
        for index, mechanic in enumerate(mechanics(trainer.optimizers)):
            end = f"-{index}" if index else ""
            for name, value in mechanic.metrics().items():
                shown = self._prog_bar and name.startswith(("scale", "effective_lr"))
                self.log(f"{self._prefix}{name}{end}", value, on_step=True, on_epoch=False, prog_bar=shown)
