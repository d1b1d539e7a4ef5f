"""The plain tensors that a tensor consists of: subclasses, and dtypes of low precision, have few operations."""

from __future__ import annotations

import torch
from torch import Tensor

from manic.distributed.layout import local

__all__ = ["plain_parts"]


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """This rank's part of ``tensor`` as tensors that can be compared and summed. Must be called without gradients.

    Args:
        tensor: Any tensor: plain, a DTensor, or of a subclass, for example quantized state or a quantized parameter.

    Returns:
        The tensor; of a subclass with ``__tensor_flatten__`` the tensors inside, recursively; float8 and smaller dtypes
        as bytes. Empty where a tensor has none of this: of other subclasses without storage, or on the meta device.
    """
    tensor = local(tensor)
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        names, _ = flatten()
        inside = (getattr(tensor, name) for name in names)
        return [part for each in inside if isinstance(each, Tensor) for part in plain_parts(each)]
    if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
        return []
    if _is_plain(tensor):
        return [tensor]
    try:
        return [tensor.contiguous().view(torch.uint8)]
    except Exception:  # a subclass may raise anything for what it does not have
        return []


def _is_plain(tensor: Tensor) -> bool:
    # Others, like bitsandbytes' parameters, are plain tensors of another name, if nothing handles their operations.
    handles = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    is_small = tensor.dtype.itemsize == 1 and tensor.dtype not in (torch.uint8, torch.int8, torch.bool)
    return not handles and not is_small
