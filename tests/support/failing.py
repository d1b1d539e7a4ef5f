"""An operator of torch that fails on purpose."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class FailsAt(TorchDispatchMode):
    """Raises in the place of operator number ``at``, once; counts all."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.at, self.count, self.failed_in = at, 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "aten"  # not the profiler's marks
        if func.namespace == "aten" and self.count == self.at:
            self.failed_in = str(func)
            raise MemoryError("out of luck")
        return func(*args, **(kwargs or {}))
