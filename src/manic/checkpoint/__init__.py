"""Sharded checkpoints of a run: collecting, writing, verifying and loading its state.

Works with any optimizer and does not depend on the step.
"""

from manic.checkpoint.checkpointer import Checkpointer
from manic.checkpoint.manifest import DamagedCheckpointError
from manic.distributed.collectives import on_first_rank

__all__ = ["Checkpointer", "DamagedCheckpointError", "on_first_rank"]
