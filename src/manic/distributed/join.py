"""Refusal of steps inside DistributedDataParallel's ``join()``, whose shadow collectives know none of a step's.

A rank that has run out of inputs repeats the collectives of DDP alone. The step's all_reduce of a rank with inputs left
would pair up with one of these.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from manic.distributed.instances import instances_of

__all__ = ["JoinGuard"]


class JoinGuard:
    """Knows the DDP modules that hold an optimizer's parameters. It does not keep them alive."""

    def __init__(self) -> None:
        self._modules: list[weakref.ref[DistributedDataParallel]] = []

    def find(self, parameters: Iterable[Tensor]) -> None:
        """Find the modules, among all objects of the process: no parameter knows its module.

        Args:
            parameters: The optimizer's on this rank. If there are none, as on a rank of ZeRO, every module counts.
        """
        mine = {id(parameter) for parameter in parameters}
        self._modules = [
            weakref.ref(module)
            for module in instances_of(DistributedDataParallel)
            if not mine or any(id(parameter) in mine for parameter in module.parameters())
        ]

    def refuse(self, parameters: Iterable[Tensor]) -> None:
        """Raise if the optimizer is inside ``join()`` of one of them: on every rank that has inputs.

        Args:
            parameters: Those of :meth:`find`, which is repeated if a module is gone: another may hold them.

        Raises:
            RuntimeError: with what to do instead.
        """
        if any(reference() is None for reference in self._modules):
            self.find(parameters)
        for reference in self._modules:
            # torch has no public way to ask; tests/distributed/test_join.py fails if the attribute is renamed.
            config = getattr(reference(), "_join_config", None)
            if config is not None and config.enable:
                raise RuntimeError(
                    "the step was not taken: it is inside join() of a DistributedDataParallel, where ranks that have "
                    "no inputs left do not take part in Mechanic's all_reduce. Leave out join(), and take the same "
                    "number of steps on all ranks: drop_last=True of DistributedSampler and DataLoader gives all ranks "
                    "equally many batches. After join(), torch leaves a module marked: enter join(enable=False) once"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {"_modules": []}  # a copy of the optimizer has parameters of its own
