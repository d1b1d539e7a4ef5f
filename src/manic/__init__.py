"""manic: Mechanic, the learning rate tuner, for sharded training."""

from manic.mechanic import Mechanic
from manic.mechanize import is_mechanized, mechanize
from manic.step.guard import NonfiniteError

__all__ = ["Mechanic", "NonfiniteError", "__version__", "is_mechanized", "mechanize"]
__version__ = "0.1.0"
