"""From x to Delta and back: how the base optimizer's update is taken, and x = x_ref + S * Delta written.

It works on the plain local tensors of one rank. It knows no process group and no placements, and takes S as given.

*Displacement space.* An update that does not depend on where the parameters are can be made on Delta instead of on
x: the parameter's own storage holds a displacement while the base optimizer steps. No copy, and no cancellation.

*Snapshot.* For every other update: keep x aside for the length of the step and take the difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Iterate", "Update", "chunks", "resolve_update", "stepping", "strays", "working_dtype", "write_back"]

Update = Literal["snapshot", "decoupled", "coupled"]
"""How an optimizer's update is taken: by the difference of a snapshot, or in displacement space with weight decay
that acts on the parameter (decoupled) or through the gradient (coupled)."""

# Elements worked on at a time. On a CPU the operands of one chunk stay in the core's cache, so that several
# operations cost one pass over memory; elsewhere a chunk bounds the scratch and is large enough to fill the device.
_CPU_CHUNK = 1 << 18
_DEVICE_CHUNK = 1 << 24

# The optimizers whose source was read (torch 2.6 to 2.13): the update is a function of gradients and state alone,
# apart from the weight decay named here. Adafactor (scales by the parameter's RMS) and ASGD (averages parameters)
# read the position and are not among them.
_DISPLACEMENT_SPACE: dict[str, Literal["decoupled", "coupled", "by group"]] = {
    "SGD": "coupled",
    "Adam": "by group",
    "AdamW": "decoupled",
    "NAdam": "by group",
    "RAdam": "by group",
    "Adamax": "coupled",
    "Adagrad": "coupled",
    "RMSprop": "coupled",
    "Adadelta": "coupled",
    "Rprop": "coupled",
    "Muon": "decoupled",
}


def resolve_update(optimizer: Optimizer, update: str) -> str:
    """Choose how ``optimizer``'s update is taken.

    Args:
        optimizer: A base optimizer.
        update: ``"auto"``, or one of :data:`Update` to decide it yourself. ``"auto"`` takes displacement space for the
            optimizers of ``torch.optim`` that allow it (the classes themselves; a subclass may do anything), and a
            snapshot for all others.

    Returns:
        One of :data:`Update`, or ``"by group"`` where each param group says whether its decay is decoupled.

    Raises:
        ValueError: if ``update`` is none of these.
    """
    if update == "auto":
        known = getattr(torch.optim, type(optimizer).__name__, None) is type(optimizer)
        return _DISPLACEMENT_SPACE.get(type(optimizer).__name__, "snapshot") if known else "snapshot"
    if update not in get_args(Update):
        raise ValueError(f"update must be 'auto' or one of {get_args(Update)}, got {update!r}")
    return update


@dataclass(eq=False)
class Iterate:
    """One parameter's local shard in Mechanic's coordinates: x = x_ref + S * Delta.

    All tensors are plain, of the shard's shape and on its device.
    """

    parameter: Tensor
    """The parameter as the base optimizer holds it; a DTensor where it is sharded."""
    group: dict[str, Any]
    """The param group it belongs to."""
    update: Update
    x: Tensor
    """The parameter's local storage, of its dtype."""
    gradient: Tensor | None
    x_ref: Tensor
    """x_1, of the parameter's dtype."""
    delta: Tensor | None
    """Delta_t, at least float32; ``None`` where it is recomputed from x, x_ref and S."""
    replicas: float
    """How many ranks of the group hold each element."""
    scale: Tensor
    """S_t: 0-dim."""
    eps: float
    """Added to S_t where Delta is recomputed."""
    x_before: Tensor | None = None
    """The snapshot of x_t, during the base step."""
    never_moved: bool = False
    """It has had no gradient yet: it counts in |x|^2, and there is nothing to step on or to write."""
    written: bool = False
    """x_{t+1} is in place."""

    def delta_from(self, x: Tensor, x_ref: Tensor) -> Tensor:
        """Recompute Delta_t from chunks of x_t and x_ref: a new tensor of their shape, in the working dtype."""
        dtype = working_dtype(x)
        return (x.to(dtype) - x_ref).div_((self.scale + self.eps).to(dtype))


def working_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which ``tensor``'s elements are multiplied: float64 for float64, float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def chunks(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Cut tensors of one shape into aligned pieces that are views of them.

    Args:
        tensors: Tensors of one shape; a ``None`` stays a ``None`` in every piece.

    Yields:
        A tuple as long as ``tensors``. Contiguous tensors are cut flat; others come whole.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    size = _CPU_CHUNK if present[0].is_cpu else _DEVICE_CHUNK
    total = present[0].numel()
    if total == 0:
        return
    if total <= size or not all(tensor.is_contiguous() for tensor in present):
        yield tensors
        return
    flat = [None if tensor is None else tensor.view(-1) for tensor in tensors]
    for start in range(0, total, size):
        yield tuple(None if tensor is None else tensor[start : start + size] for tensor in flat)


@contextmanager
def stepping(iterates: Sequence[Iterate]) -> Iterator[None]:
    """Let the base optimizers step inside, and then :func:`write_back` what they left in each ``x``.

    Weight decay that the base optimizer would compute from the parameter's storage is made here, from x, and its
    setting is 0 inside. Whatever is raised inside, parameters hold an iterate, and gradients and settings are put
    back, before it leaves.

    Args:
        iterates: Every iterate that the base optimizers may move.
    """
    entered: list[Iterate] = []
    decays: list[tuple[dict[str, Any], Any]] = []
    gradients: list[tuple[Tensor, Tensor | None]] = []
    try:
        for iterate in iterates:
            if iterate.never_moved:
                continue
            if iterate.update == "coupled" and iterate.gradient is not None and _weight_decay(iterate):
                gradients.append((iterate.parameter, iterate.parameter.grad))
                iterate.parameter.grad = _decayed_gradient(iterate)
            entered.append(iterate)
            _enter(iterate)
        for group in {id(it.group): it.group for it in iterates if it.update != "snapshot"}.values():
            if "weight_decay" in group:
                decays.append((group, group["weight_decay"]))
                group["weight_decay"] = 0.0
        yield
    except BaseException:
        for iterate in entered:
            if not iterate.written:
                _undo(iterate)
        raise
    finally:
        for group, weight_decay in decays:
            group["weight_decay"] = weight_decay
        for parameter, gradient in gradients:
            parameter.grad = gradient


def write_back(iterates: Sequence[Iterate], scale: Tensor) -> None:
    """Add the base optimizer's update to Delta and write x = x_ref + S * Delta.

    Args:
        iterates: What :func:`stepping` was given.
        scale: S_{t+1}, a 0-dim tensor.
    """
    for iterate in iterates:
        if iterate.never_moved:
            continue
        factor = scale.to(iterate.x.device, working_dtype(iterate.x))
        for x, x_ref, delta, x_before in chunks(iterate.x, iterate.x_ref, iterate.delta, iterate.x_before):
            if x_before is None:
                moved = x if delta is None else delta.add_(x)
            elif delta is None:
                moved = iterate.delta_from(x_before, x_ref).add_(x.to(factor.dtype) - x_before)
            else:
                moved = delta.add_(x.to(delta.dtype) - x_before)
            _write(x, x_ref, moved, factor)
        iterate.written = True
        iterate.x_before = None


def strays(iterates: Sequence[Iterate], any_scale: bool) -> list[int]:
    """Find parameters that are not where x_ref, S and Delta say: something else has written them.

    Where Delta is recomputed from x there is nothing to compare, and none strays. The host waits for the device.

    Args:
        iterates: The local shards, between steps.
        any_scale: Whether x = x_ref + c * Delta is right for any c, as for variants that leave a parameter without a
            gradient where an earlier S has put it.

    Returns:
        Indices into ``iterates``.
    """
    candidates = [(index, it) for index, it in enumerate(iterates) if it.delta is not None and it.x.numel()]
    if not candidates:
        return []
    found = torch.stack([_is_astray(iterate, any_scale).cpu() for _, iterate in candidates])
    return [index for (index, _), astray in zip(candidates, found.tolist()) if astray]


def _is_astray(iterate: Iterate, any_scale: bool) -> Tensor:
    dtype = working_dtype(iterate.x)
    scale = iterate.scale.to(dtype)
    if any_scale:
        along, square = torch.zeros_like(scale), torch.zeros_like(scale)
        for x, x_ref, delta in chunks(iterate.x, iterate.x_ref, iterate.delta):
            along += ((x.to(dtype) - x_ref) * delta).sum()
            square += delta.square().sum()
        scale = along / (square + torch.finfo(dtype).tiny)
    error, size = torch.zeros_like(scale), torch.zeros_like(scale)
    # A checkpoint in low precision may have been loaded into wider parameters: then x is that exact, and no more.
    coarse = {kind: torch.ones_like(scale, dtype=torch.bool) for kind in (torch.bfloat16, torch.float16, torch.float32)}
    for x, x_ref, delta in chunks(iterate.x, iterate.x_ref, iterate.delta):
        displacement = scale * delta
        error += (x.to(dtype) - (x_ref.to(dtype) + displacement)).square().sum()
        size += x.to(dtype).square().sum() + displacement.square().sum()
        for kind, fits in coarse.items():
            fits &= (x.to(kind).to(x.dtype) == x).all()
    rounding = torch.full_like(scale, torch.finfo(iterate.x.dtype).eps)
    for kind, fits in coarse.items():
        rounding = torch.where(fits, rounding.clamp(min=torch.finfo(kind).eps), rounding)
    # Written so that a nan is no reason: what is not finite is another matter.
    return error > (4 * rounding).square() * size


def _write(x: Tensor, x_ref: Tensor, delta: Tensor, factor: Tensor) -> None:
    if x.dtype == delta.dtype == factor.dtype:
        torch.addcmul(x_ref, delta, factor, out=x)
    else:  # low precision: one rounding, at the end
        x.copy_(torch.addcmul(x_ref.to(factor.dtype), delta.to(factor.dtype), factor))


def _enter(iterate: Iterate) -> None:
    """Make ``x`` ready for the base step: a snapshot, or the displacement that the update is added to."""
    if iterate.update == "snapshot":
        iterate.x_before = iterate.x.clone()
        return
    decays = iterate.update == "decoupled" and iterate.gradient is not None and bool(_weight_decay(iterate))
    decay = _weight_decay(iterate) * iterate.group["lr"] if decays else 0.0
    for x, x_ref, delta in chunks(iterate.x, iterate.x_ref, iterate.delta):
        if delta is None:
            displacement = iterate.delta_from(x, x_ref)
            x.copy_(displacement.sub_(x * decay) if decays else displacement)
        elif decays:
            x.mul_(-decay)
        else:
            x.zero_()


def _undo(iterate: Iterate) -> None:
    """Put x_t back after a base step that raised: exactly where a snapshot or Delta is kept, closely elsewhere."""
    if iterate.update == "snapshot" and iterate.x_before is None:
        return  # there was no memory for the snapshot: nothing has changed yet
    factor = (iterate.scale + (iterate.eps if iterate.delta is None else 0.0)).to(working_dtype(iterate.x))
    for x, x_ref, delta, x_before in chunks(iterate.x, iterate.x_ref, iterate.delta, iterate.x_before):
        if x_before is None:
            _write(x, x_ref, x if delta is None else delta, factor)
        else:
            x.copy_(x_before)
    iterate.x_before = None


def _weight_decay(iterate: Iterate) -> Any:
    return iterate.group.get("weight_decay", 0.0)


def _decayed_gradient(iterate: Iterate) -> Tensor:
    """The gradient with coupled weight decay in it, of the parameter's kind; the user's own is left as it is."""
    parameter = iterate.parameter
    assert parameter.grad is not None
    sign = -1.0 if iterate.group.get("maximize", False) else 1.0
    return parameter.grad.add(parameter.detach(), alpha=sign * float(_weight_decay(iterate)))
