"""Sharded checkpoints of a run: what is saved, how it is written, and how it is verified and loaded again.

It works with any optimizer and knows nothing of a step.
"""

from manic.checkpoint.checkpointer import Checkpointer
from manic.checkpoint.manifest import DamagedCheckpointError
from manic.distributed.collectives import on_first_rank

__all__ = ["Checkpointer", "DamagedCheckpointError", "on_first_rank"]
