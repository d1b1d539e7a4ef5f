"""From x to Delta and back: how the base optimizer's update is taken, and x = x_ref + S * Delta written.

It works on the plain local tensors of one rank. It knows no process group and no placements, and takes S as given.

*Displacement space.* An update that does not depend on where the parameters are can be made on Delta instead of on
x. An optimizer of torch.optim is handed Delta in the parameter's place, where Delta has the parameter's dtype; for all
others the parameter's storage holds a displacement during the base step. No copy, and no cancellation.

*Snapshot.* For every other update: keep x aside for the length of the step and take the difference.

*Scaled.* Where S is known before the step, and scales updates rather than Delta, an optimizer whose update is
proportional to its learning rate does all of it by itself: x is where it leaves it.

The time goes into moving words between memory and the cores, so the tensors are gone through once before the base step
and once after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from manic.step.chunks import Scratch, batched, pieces
from manic.step.kernels import Kernels, add_product, plain, working_dtype

__all__ = [
    "Batch", "Iterate", "Update", "Visit", "batches", "begin_anew", "is_proportional", "resolve_update",
    "scaled_learning_rates", "show", "show_updates", "stepping", "strays", "write_back",
]  # fmt: skip

Update = Literal["snapshot", "decoupled", "coupled", "scaled"]
"""How an optimizer's update is taken: by the difference of a snapshot, in displacement space with weight decay
that acts on the parameter (decoupled) or through the gradient (coupled), or not at all, for it has S in it."""

_CHOICES = ("snapshot", "decoupled", "coupled")

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
        update: ``"auto"``, or ``"snapshot"``, ``"decoupled"`` or ``"coupled"`` to decide it yourself. ``"auto"`` takes
            displacement space for the optimizers of ``torch.optim`` that allow it (the classes themselves; a subclass
            may do anything), and a snapshot for all others.

    Returns:
        One of these three, or ``"by group"`` where each param group says whether its decay is decoupled.

    Raises:
        ValueError: if ``update`` is none of these.
    """
    if update == "auto":
        known = getattr(torch.optim, type(optimizer).__name__, None) is type(optimizer)
        return _DISPLACEMENT_SPACE.get(type(optimizer).__name__, "snapshot") if known else "snapshot"
    if update not in _CHOICES:
        raise ValueError(f"update must be 'auto' or one of {_CHOICES}, got {update!r}")
    return update


def is_proportional(optimizer: Optimizer) -> bool:
    """Whether ``optimizer``'s update, weight decay included, is known to be its learning rate times what is none of it.

    Rprop takes its learning rate for its first step only.
    """
    return resolve_update(optimizer, "auto") != "snapshot" and not isinstance(optimizer, torch.optim.Rprop)


@dataclass(eq=False)
class Iterate:
    """One parameter's local shard in Mechanic's coordinates: x = x_ref + S * Delta.

    All tensors but ``parameter`` and ``stand_in`` are plain, of the shard's shape and on its device.
    """

    optimizer: Optimizer
    """The base optimizer that has the parameter."""
    group: dict[str, Any]
    """The param group it belongs to."""
    parameter: Tensor
    """The parameter as the base optimizer holds it; a DTensor where it is sharded."""
    update: Update
    x: Tensor
    """The parameter's local storage, of its dtype."""
    gradient: Tensor | None
    x_ref: Tensor
    """x_1, of the parameter's dtype."""
    delta: Tensor | None
    """Delta_t, at least float32; ``None`` where it is recomputed from x, x_ref and S."""
    stand_in: Tensor | None
    """What ``delta`` is the local shard of, where the base optimizer steps on that instead of on ``parameter``."""
    replicas: float
    """How many ranks of the group hold each element."""
    scale: Tensor
    """The factor f_t in x_t = x_ref + f_t * Delta_t, S_t or 1: 0-dim."""
    eps: float
    """Added to it where Delta is recomputed."""
    decay: float | Tensor = 0.0
    """How much of x_t decoupled weight decay adds to Delta, a negative number: set during the step."""
    x_before: Tensor | None = None
    """The snapshot of x_t, during the base step."""
    displaced: int = 0
    """How many elements of ``x``, from its first, have been made to hold a displacement, for the base step."""
    starts_here: bool = False
    """x_ref was made of x in this step."""
    never_moved: bool = False
    """It has had no gradient yet: it counts in |x|^2, and there is nothing to step on or to write."""
    written: int = 0
    """How many elements of ``x``, from its first, hold x_{t+1}."""

    def delta_from(self, x: Tensor, x_ref: Tensor, scratch: Scratch) -> Tensor:
        """Recompute Delta_t from pieces of x_t and x_ref: in ``scratch``, of their shape, in the working dtype."""
        delta = scratch.like(x, working_dtype(x))
        if x.dtype == delta.dtype:
            torch.sub(x, x_ref, out=delta)
        else:
            delta.copy_(x).sub_(x_ref)
        return delta.div_((self.scale + self.eps).to(delta.dtype))


Batch = list[Iterate]
"""Iterates that are worked on as if they were one; the first speaks for all."""

Visit = Callable[[Iterate, Tensor, Tensor, "Tensor | None"], None]
"""Is shown a piece of Delta_t, x and the gradient, if there is one, and whose it is."""


def batches(iterates: Iterable[Iterate]) -> list[Batch]:
    """Put small iterates together that are alike."""
    return batched(
        iterates,
        tensor_of=lambda it: it.x,
        kind_of=lambda it: (id(it.group), it.replicas, it.gradient is None, it.never_moved, it.stand_in is None),
    )


@contextmanager
def stepping(batches: Sequence[Batch], visit: Visit | None = None) -> Iterator[None]:
    """Let the base optimizers step inside, and then :func:`write_back` what they did.

    Weight decay that the base optimizer would compute from the parameter's storage is made here, from x, and its
    setting is 0 inside. Whatever is raised inside, before it leaves parameters hold x_ref + S_t * Delta, and gradients
    and settings are put back. That is x_t, or, where an update has arrived in Delta already, x_t moved by that update
    at the scale as it was; the base optimizer's momenta have seen it, too.

    Args:
        batches: Every iterate that the base optimizers may move.
        visit: Is shown every piece, with x_t, before anything is changed in it, so that one pass serves both.
    """
    iterates = [iterate for batch in batches for iterate in batch]
    with _without_weight_decay(iterates):
        try:
            scratch = Scratch()
            for batch in batches:
                _enter(batch, visit, scratch)
            del scratch
            with _standing_in(iterates):
                yield
        except BaseException:
            for iterate in iterates:
                _undo(iterate)
            raise


def show(batches: Iterable[Batch], visit: Visit) -> None:
    """Show ``visit`` every piece of Delta_t, of what the parameters hold now, and of the gradients.

    Args:
        batches: Iterates between steps, or with a snapshot.
        visit: Changes nothing.
    """
    scratch = Scratch()
    for batch in batches:
        first = batch[0]
        recomputed = ("x_ref", "x_before") if first.delta is None else ()
        for x, delta, gradient, *before in pieces(*_columns(batch, "x", "delta", "gradient", *recomputed)):
            if delta is None:
                x_ref, x_before = before
                delta = first.delta_from(x if x_before is None else x_before, x_ref, scratch)
            visit(first, delta, x, gradient)


def show_updates(batches: Iterable[Batch], visit: Visit) -> None:
    """Show ``visit`` every piece of what the base optimizers have done, weight decay included, instead of Delta and x.

    Args:
        batches: Iterates after the base step, none of which has a stand-in.
        visit: Changes nothing.
    """
    for batch in batches:
        if not batch[0].never_moved:
            for x, x_before in pieces(*_columns(batch, "x", "x_before")):
                assert batch[0].update != "scaled", "there is no telling the update from x"
                update = x if x_before is None else x - x_before
                visit(batch[0], update, update, None)


def write_back(batches: Iterable[Batch], scale: Tensor, kernels: Kernels, step: Tensor | None = None) -> None:
    """Complete Delta by the base optimizer's update and write x_{t+1} = x_ref + f_{t+1} * Delta_{t+1}.

    Args:
        batches: What :func:`stepping` was given.
        scale: f_{t+1}, a 0-dim tensor.
        kernels: How it is written.
        step: What the update is multiplied by on its way into Delta, a 0-dim tensor; needs updates that are taken
            apart from Delta. ``None``: nothing.
    """
    scratch = Scratch()
    for batch in batches:
        first = batch[0]
        if first.never_moved or first.update == "scaled":
            continue
        factor = scale.to(first.x.device, working_dtype(first.x))
        share = None if step is None else step.to(factor)
        columns = _columns(batch, "x", "x_ref", "delta", "x_before")
        for x, x_ref, delta, x_before in pieces(*columns, written=(0, 2)):
            if first.stand_in is not None:
                kernels.write(x, x_ref, delta, first.decay, factor)
            else:
                update = x if x_before is None else x.to(factor.dtype) - x_before
                if share is not None and delta is None:
                    x.copy_(torch.addcmul(x_before.to(factor.dtype), update, share))  # and Delta follows from that
                elif share is not None:
                    kernels.write(x, x_ref, delta.addcmul_(update, share), 0.0, factor)
                else:
                    if delta is None and x_before is not None:
                        delta = first.delta_from(x_before, x_ref, scratch)
                    kernels.write(x, x_ref, update if delta is None else delta.add_(update), 0.0, factor)
            if len(batch) == 1:
                first.written += x.numel()
        for iterate in batch:  # of several, the pieces were copies, which are back in their places only now
            iterate.written = iterate.x.numel()
            iterate.x_before = None


def begin_anew(batches: Sequence[Batch], whether: Tensor, kept: Tensor) -> None:
    """Let x_ref be at ``kept`` of the way from x_ref to x, x as well, and Delta what x was rounded by.

    All of that where ``whether`` is 1, and nothing where it is 0; the host need not know which. If this is interrupted,
    x stays where it is by then, back or not, and is x_ref.

    Args:
        batches: Iterates after their step, in a variant of which x is x_ref + Delta.
        whether: 0-dim, 0 or 1.
        kept: 0-dim, in (0, 1]; 1: x stays as it is, to the last bit.
    """
    try:
        for batch in batches:
            _begin_anew(batch, whether, kept)
    except BaseException:
        for batch in batches:
            _begin_here(batch, whether)
        raise


def _begin_anew(batch: Batch, whether: Tensor, kept: Tensor) -> None:
    if batch[0].never_moved:
        return
    dtype = working_dtype(batch[0].x)
    whether, kept = whether.to(batch[0].x.device, dtype), kept.to(batch[0].x.device, dtype)
    goes_back = (whether > 0) & (kept < 1)
    for x, x_ref, delta in pieces(*_columns(batch, "x", "x_ref", "delta"), written=(0, 1, 2)):
        start = x_ref.to(dtype)
        way = x - start if delta is None else delta
        place = torch.where(goes_back, start + kept * way, x)
        whole = place if delta is None else torch.where(goes_back, place, start + way)
        x.copy_(place)
        if delta is not None:
            delta.lerp_(whole - x, whether)
        x_ref.lerp_(x, whether.to(x.dtype))


def _begin_here(batch: Batch, whether: Tensor) -> None:
    if not batch[0].never_moved:
        weight = whether.to(batch[0].x.device, working_dtype(batch[0].x))
        for x, x_ref, delta in pieces(*_columns(batch, "x", "x_ref", "delta"), written=(1, 2)):
            if delta is not None:
                delta.lerp_(torch.zeros_like(delta), weight)
            x_ref.lerp_(x, weight.to(x.dtype))


def strays(places: Sequence[tuple[Tensor, Tensor, Tensor]], scale: Tensor, any_scale: bool) -> list[int]:
    """Find parameters that are not where x_ref, S and Delta say: something else has written them.

    The host waits for the device.

    Args:
        places: x, x_ref and Delta of each parameter, as local tensors, between steps.
        scale: S_t, 0-dim.
        any_scale: Whether x = x_ref + c * Delta is right for any c, as for variants that leave a parameter without a
            gradient where an earlier S has put it.

    Returns:
        Indices into ``places``.
    """
    if not places:
        return []
    found = torch.stack([_is_astray(*place, scale.to(place[0].device), any_scale).cpu() for place in places])
    return found.nonzero().flatten().tolist()


def _is_astray(x: Tensor, x_ref: Tensor, delta: Tensor, scale: Tensor, any_scale: bool) -> Tensor:
    whole, dtype = x, working_dtype(x)
    scale = scale.to(dtype)
    if any_scale:
        along, square = torch.zeros_like(scale), torch.zeros_like(scale)
        for x, x_ref_, delta_ in pieces([whole], [x_ref], [delta]):
            along += ((x.to(dtype) - x_ref_) * delta_).sum()
            square += delta_.square().sum()
        scale = along / (square + torch.finfo(dtype).tiny)
    error, size = torch.zeros_like(scale), torch.zeros_like(scale)
    # A checkpoint in low precision may have been loaded into wider parameters: then x is that exact, and no more.
    coarse = {kind: torch.ones_like(scale, dtype=torch.bool) for kind in (torch.bfloat16, torch.float16, torch.float32)}
    for x, x_ref_, delta_ in pieces([whole], [x_ref], [delta]):
        displacement = scale * delta_
        error += (x.to(dtype) - (x_ref_.to(dtype) + displacement)).square().sum()
        size += x.to(dtype).square().sum() + displacement.square().sum()
        for kind, fits in coarse.items():
            fits &= (x.to(kind).to(x.dtype) == x).all()
    relative = torch.full_like(scale, torch.finfo(whole.dtype).eps)
    absolute = torch.full_like(scale, _smallest(whole.dtype))
    for kind, fits in coarse.items():
        relative = torch.where(fits, relative.clamp(min=torch.finfo(kind).eps), relative)
        absolute = torch.where(fits, absolute.clamp(min=_smallest(kind)), absolute)
    # Written so that a nan is no reason: what is not finite is another matter.
    return error > (4 * relative).square() * size + (4 * absolute).square() * whole.numel()


def _smallest(dtype: torch.dtype) -> float:
    """The distance of numbers near 0, which are not rounded relative to their size."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


def _columns(batch: Batch, *names: str) -> list[list[Tensor | None]]:
    return [[getattr(iterate, name) for iterate in batch] for name in names]


def _scale(x: Tensor, factor: float | Tensor) -> None:
    """``x *= factor``, without a look at x where the factor is known to be 0."""
    if isinstance(factor, Tensor) or factor:
        x.mul_(factor)
    else:
        x.zero_()


def _enter(batch: Batch, visit: Visit | None, scratch: Scratch) -> None:
    """Show ``visit`` every piece of x_t; make ``x`` ready: a snapshot, or the displacement that takes the update."""
    first = batch[0]
    snapshot = first.update == "snapshot" and not first.never_moved
    for iterate in batch if snapshot else ():
        iterate.x_before = iterate.x_ref if iterate.starts_here else iterate.x.clone()
    stays = snapshot or first.never_moved or first.stand_in is not None or first.update == "scaled"
    if stays and visit is None:
        return
    columns = _columns(batch, "x", "x_ref", "delta", "gradient")
    for x, x_ref, stored, gradient in pieces(*columns, written=() if stays else (0,)):
        delta = first.delta_from(x, x_ref, scratch) if stored is None else stored
        if visit is not None:
            visit(first, delta, x, gradient)
        if stays:
            continue
        if stored is not None:
            _scale(x, first.decay)
        elif x.dtype == delta.dtype and not isinstance(first.decay, Tensor):
            torch.add(delta, x, alpha=first.decay, out=x)
        else:
            x.copy_(add_product(delta, x.to(delta.dtype), first.decay))
        if len(batch) == 1:
            first.displaced += x.numel()
    for iterate in () if stays else batch:
        iterate.displaced = iterate.x.numel()


def _undo(iterate: Iterate) -> None:
    """After a step that raised, let ``x`` be x_ref + S_t * Delta again, with what Delta has become by then."""
    if iterate.update == "scaled":
        return  # Delta is where x is
    factor = (iterate.scale + (iterate.eps if iterate.delta is None else 0.0)).to(working_dtype(iterate.x))
    columns = _columns([iterate], "x", "x_ref", "delta", "x_before")
    start = 0
    for x, x_ref, delta, x_before in pieces(*columns):
        is_written, is_displaced = start < iterate.written, start < iterate.displaced
        start += x.numel()
        if x_before is not None and not is_written:
            x.copy_(x_before)
        if delta is None:
            if is_displaced and not is_written:
                # x holds Delta_t + decay * x_t, which is (1 + decay * factor) * Delta_t + decay * x_ref: to rounding.
                delta = (x.to(factor.dtype) - iterate.decay * x_ref) / (1.0 + iterate.decay * factor)
                plain().write(x, x_ref, delta, 0.0, factor)
        elif is_displaced and not is_written:
            plain().write(x, x_ref, delta, 0.0, factor)
        else:
            right = torch.empty_like(x)
            plain().write(right, x_ref, delta, 0.0, factor)
            rounding = 4 * torch.finfo(x.dtype).eps * (x_ref.abs() + right.abs())
            x.copy_(torch.where((right - x).abs() <= rounding, x, right))  # x_t keeps every bit
    iterate.x_before = None


@contextmanager
def scaled_learning_rates(iterates: Iterable[Iterate], scale: float) -> Iterator[None]:
    """Multiply the learning rates of the groups of *scaled* iterates by ``scale`` inside."""
    groups = {id(it.group): it.group for it in iterates if it.update == "scaled"}.values()
    lrs = [(group, group["lr"]) for group in groups]
    try:
        for group, lr in lrs:
            group["lr"] = lr * scale
        yield
    finally:
        for group, lr in lrs:
            group["lr"] = lr


@contextmanager
def _without_weight_decay(iterates: Sequence[Iterate]) -> Iterator[None]:
    """Take over from the base optimizers what they would do with x; the user's gradients are left as they are."""
    decays: list[tuple[dict[str, Any], Any]] = []
    gradients: list[tuple[Tensor, Tensor | None]] = []
    try:
        for iterate in iterates:
            weight_decay = iterate.group.get("weight_decay", 0.0)
            if not weight_decay or iterate.gradient is None:
                continue
            if iterate.update == "decoupled":
                iterate.decay = -weight_decay * _without_copy(iterate.group["lr"])
            elif iterate.update == "coupled":
                gradients.append((iterate.parameter, iterate.parameter.grad))
                iterate.parameter.grad = _decayed_gradient(iterate, float(weight_decay))
        for group in {id(it.group): it.group for it in iterates if it.update in ("decoupled", "coupled")}.values():
            if "weight_decay" in group:
                decays.append((group, group["weight_decay"]))
                group["weight_decay"] = 0.0
        yield
    finally:
        for group, weight_decay in decays:
            group["weight_decay"] = weight_decay
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _without_copy(lr: Any) -> Any:
    """A number where the host knows it; a learning rate on another device stays there."""
    return lr if isinstance(lr, Tensor) and not lr.is_cpu else float(lr)


def _decayed_gradient(iterate: Iterate, weight_decay: float) -> Tensor:
    """The gradient with coupled weight decay in it, of the parameter's kind."""
    parameter = iterate.parameter
    assert parameter.grad is not None
    sign = -1.0 if iterate.group.get("maximize", False) else 1.0
    return parameter.grad.add(parameter.detach(), alpha=sign * weight_decay)


@contextmanager
def _standing_in(iterates: Sequence[Iterate]) -> Iterator[None]:
    """Hand base optimizers Delta where they know a parameter: in their groups, and as the key of its state."""
    swaps = [(it.optimizer.state, it.parameter, it.stand_in) for it in iterates if it.stand_in is not None]
    stand_ins = {id(parameter): delta for _, parameter, delta in swaps}
    groups = {id(it.group): it.group for it in iterates if it.stand_in is not None}.values()
    members = [(group, group["params"]) for group in groups]
    try:
        for states, parameter, delta in swaps:
            delta.grad = parameter.grad
            states[delta] = states.pop(parameter)
        for group, parameters in members:
            group["params"] = [stand_ins.get(id(parameter), parameter) for parameter in parameters]
        yield
    finally:
        for group, parameters in members:
            group["params"] = parameters
        for states, parameter, delta in swaps:
            delta.grad = None
            if delta in states:
                states[parameter] = states.pop(delta)
