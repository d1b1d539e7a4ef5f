"""torchtitan's optimizers with one scale over all model parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer

from manic.mechanic import Mechanic

__all__ = ["MechanicContainer"]


class MechanicContainer(OptimizersContainer):
    """torchtitan's container, with one :class:`~manic.Mechanic` around the optimizers that it has built.

    Iterating over it gives that Mechanic alone, so torchtitan's schedulers and checkpoints see one optimizer with the
    param groups of all model parts.

    Args:
        config: As for torchtitan's container, with the options of Mechanic.
        model_parts: This rank's.

    Raises:
        TypeError, ValueError: as Mechanic does.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """torchtitan's configuration, in which a learning rate may be 1.0."""

        mechanic: dict[str, Any] = field(default_factory=dict)
        """Options of :class:`~manic.Mechanic`. With pipeline parallelism: ``{"pipeline_stages": degree}``."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        super().__init__(config, model_parts=model_parts)
        bases: list[Optimizer] = list(self.optimizers)
        self.optimizers: list[Mechanic] = [Mechanic(bases, **config.mechanic)]

    @property
    def mechanic(self) -> Mechanic:
        """What learns the scale: it has ``scale`` and ``metrics()``."""
        (mechanic,) = self.optimizers
        return mechanic
