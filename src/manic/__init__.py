"""manic: Mechanic, the learning rate tuner, for sharded training."""

from manic.mechanic import Mechanic
from manic.mechanize import is_mechanized, mechanize
from manic.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
)
from manic.step.guard import NonfiniteError
from manic.unwrap import unwrap

__all__ = [
    "ASGD", "SGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Mechanic", "Muon", "NAdam",
    "NonfiniteError", "RAdam", "RMSprop", "Rprop", "__version__", "is_mechanized", "mechanize", "unwrap",
]  # fmt: skip
__version__ = "0.1.0"
