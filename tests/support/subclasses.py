"""A tensor subclass with few operations, as of quantized states and parameters, and an optimizer with such a state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


class Packed(Tensor):
    """float32 values kept as float8, and in front of it the sum of their absolute values."""

    @staticmethod
    def __new__(cls, codes: Tensor, total: Tensor) -> Packed:
        return Tensor._make_wrapper_subclass(
            cls, codes.shape, strides=codes.stride(), dtype=torch.float32, device=codes.device
        )

    def __init__(self, codes: Tensor, total: Tensor) -> None:
        self.codes, self.total = codes, total

    @staticmethod
    def pack(values: Tensor) -> Packed:
        return Packed(values.to(torch.float8_e5m2), values.abs().sum())

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "total"], None

    @classmethod
    def __tensor_unflatten__(cls, inside: dict[str, Tensor], context: None, size: Any, stride: Any) -> Packed:
        return cls(inside["codes"], inside["total"])

    def unpacked(self) -> Tensor:
        return self.codes.float()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.detach.default, aten.alias.default):
            return cls(args[0].codes, args[0].total)
        if func is aten._to_copy.default:
            return cls(args[0].codes.clone(), args[0].total.clone())
        if func is aten.is_pinned.default:
            return False
        if func is aten.copy_.default:
            target, source = args[:2]
            if isinstance(target, cls):
                new = source if isinstance(source, cls) else cls.pack(source)
                target.codes.copy_(new.codes)
                target.total.copy_(new.total)
                return target
            return target.copy_(source.unpacked())
        raise NotImplementedError(f"Packed has no {func}")

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


torch.serialization.add_safe_globals([Packed])


class PackedMoment(torch.optim.Optimizer):
    """Momentum in the subclass."""

    def __init__(self, parameters: Any, lr: float = 1.0) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "moment" not in state:
                    state["moment"] = Packed.pack(torch.zeros_like(parameter))
                moment = state["moment"].unpacked().mul_(0.9).add_(parameter.grad)
                state["moment"].copy_(moment)
                parameter.add_(moment, alpha=-group["lr"])
