"""What the base optimizers are handed for the length of their step, and get back after it whatever happens.

Weight decay that a capture makes by hand, learning rates with S in them, Delta in the place of parameters, and no state
of ours where they have none of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from manic.optimizer.kinds import learning_rate
from manic.step.capture import Capture, DeltaAsStandIn, ScaledLearningRate
from manic.step.chunks import Scratch
from manic.step.shards import Shard

__all__ = ["base_step", "give_gradient", "restored"]

# What torch's fused optimizers read of themselves in a step; tests/step/test_deferral.py fails if it is renamed.
_FLAG = "found_inf"


@contextmanager
def base_step(
    captures: Sequence[Capture],
    scales: Sequence[float | Tensor],
    is_taken: Callable[[], bool],
    is_left_out: Tensor | None = None,
) -> Iterator[None]:
    """Let the base optimizers step inside, and x be written from what they did.

    Whatever is raised before the step is taken, afterwards parameters hold x_ref + f_t * Delta, and gradients and
    settings are restored. That is x_t, or, where an update has arrived in Delta already, x_t moved by that update at
    the scale of before; the base optimizer's momenta have seen it, too.

    Args:
        captures: Of every shard that the base optimizers may move, after their ``begin``.
        scales: Each S, for learning rates that take it in: 0-dim tensors where the host does not know it. None where
            none does.
        is_taken: Whether the step is committed, so that nothing is to be undone.
        is_left_out: 0-dim float32, 1 where fused kernels are to leave the step out; ``None``: they take it.
    """
    stand_ins = _StandIns(captures)
    try:
        with _without_weight_decay(captures):
            scratch = Scratch()
            for capture in captures:
                capture.enter(scratch)
            del scratch
            with stand_ins, _scaled_learning_rates(captures, scales), _flagged(captures, is_left_out):
                yield
    except BaseException:
        stand_ins.leave()  # once more: an interrupt may have come between its lines
        if not is_taken():
            for capture in captures:
                capture.undo()
        raise


@contextmanager
def restored(restore: Callable[[], None]) -> Iterator[None]:
    """Call ``restore`` after what is inside; twice after an error, since an interrupt may come between its lines."""
    try:
        try:
            yield
        finally:
            restore()
    except BaseException:
        restore()
        raise


@contextmanager
def _scaled_learning_rates(captures: Sequence[Capture], scales: Sequence[float | Tensor]) -> Iterator[None]:
    scaled = [capture.first for capture in captures if isinstance(capture, ScaledLearningRate)]
    groups = {id(shard.group): (shard.group, shard.column) for shard in scaled}
    lrs = [(group, group["lr"], column) for group, column in groups.values()]

    def restore() -> None:
        for group, lr, _ in lrs:
            group["lr"] = lr

    with restored(restore):
        for group, lr, column in lrs:
            assert scales, "a capture that needs S was chosen, but nobody knows it yet"
            scale = scales[column]
            # Fused kernels on a device read a float32.
            is_wide = not isinstance(scale, Tensor) or scale.is_cpu
            group["lr"] = lr * scale if is_wide else (lr * scale).to(torch.float32)
        yield


@contextmanager
def _flagged(captures: Sequence[Capture], is_left_out: Tensor | None) -> Iterator[None]:
    """Set the flag where fused optimizers of torch read it, as its GradScaler does."""
    found = {id(capture.first.optimizer): capture.first.optimizer for capture in captures}
    optimizers = [] if is_left_out is None else list(found.values())

    def restore() -> None:
        for optimizer in optimizers:
            vars(optimizer).pop(_FLAG, None)

    with restored(restore):
        for optimizer in optimizers:
            setattr(optimizer, _FLAG, is_left_out)
        yield


@contextmanager
def _without_weight_decay(captures: Sequence[Capture]) -> Iterator[None]:
    """Take over from the base optimizers what they would do with x; the user's gradients are left as they are."""
    decays: list[tuple[dict[str, Any], Any]] = []
    gradients: list[tuple[Tensor, Tensor | None, torch.dtype | None]] = []

    def restore() -> None:
        for group, weight_decay in decays:
            group["weight_decay"] = weight_decay
        for parameter, gradient, dtype in gradients:
            if dtype != _expected_gradient(parameter):
                parameter.grad = None
                _expect_gradient(parameter, dtype)
            parameter.grad = gradient

    with restored(restore):
        for capture in captures:
            group, first = capture.first.group, capture.first
            capture.decay, weight_decay = 0.0, group.get("weight_decay", 0.0)
            if not capture.decays_by_hand or not weight_decay or first.gradient is None:
                continue
            if first.decay_is_decoupled:
                capture.decay = -weight_decay * _without_copy(learning_rate(group))
            else:
                for shard in capture.shards:
                    parameter = shard.parameter
                    gradients.append((parameter, parameter.grad, _expected_gradient(parameter)))
                    give_gradient(parameter, _decayed_gradient(shard, float(weight_decay)))
        for group in _groups(capture for capture in captures if capture.decays_by_hand):
            if "weight_decay" in group:
                decays.append((group, group["weight_decay"]))
                group["weight_decay"] = 0.0
        yield


def _groups(captures: Iterable[Capture]) -> list[dict[str, Any]]:
    """Their param groups, each once."""
    return list({id(capture.first.group): capture.first.group for capture in captures}.values())


def _without_copy(lr: Any) -> Any:
    """A number where the host knows it; a learning rate on another device stays there."""
    return lr if isinstance(lr, Tensor) and not lr.is_cpu else float(lr)


def _decayed_gradient(shard: Shard, weight_decay: float) -> Tensor:
    """The gradient with coupled weight decay in it, of the wider dtype of gradient and parameter."""
    parameter = shard.parameter
    assert parameter.grad is not None
    sign = -1.0 if shard.group.get("maximize", False) else 1.0
    return parameter.grad.add(parameter.detach(), alpha=sign * weight_decay)


def _expected_gradient(tensor: Tensor) -> torch.dtype | None:
    """The dtype that a gradient must have; ``None``: any. Tensors have this attribute from torch 2.10 on."""
    return getattr(tensor, "grad_dtype", tensor.dtype)


def _expect_gradient(tensor: Tensor, dtype: torch.dtype | None) -> None:
    if dtype != _expected_gradient(tensor):
        tensor.grad_dtype = dtype


def give_gradient(tensor: Tensor, gradient: Tensor | None) -> None:
    """Set a gradient, of another dtype than the tensor's too."""
    if gradient is not None and gradient.dtype != _expected_gradient(tensor):
        tensor.grad = None
        _expect_gradient(tensor, gradient.dtype)
    tensor.grad = gradient


class _StandIns:
    """Delta where base optimizers know a parameter: in their groups, and as the key of its state."""

    def __init__(self, captures: Sequence[Capture]) -> None:
        handed = [capture for capture in captures if isinstance(capture, DeltaAsStandIn)]
        shards = [shard for capture in handed for shard in capture.shards]
        self._swaps = [(each.optimizer.state, each.parameter, each.whole_delta) for each in shards]
        self._members = [(group, group["params"]) for group in _groups(handed)]

    def __enter__(self) -> None:
        stand_ins = {}
        for states, parameter, delta in self._swaps:
            assert delta is not None
            give_gradient(delta, parameter.grad)
            states[delta] = states.pop(parameter)
            stand_ins[id(parameter)] = delta
        for group, parameters in self._members:
            group["params"] = [stand_ins.get(id(parameter), parameter) for parameter in parameters]

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Restore the parameters; a second call completes one that was interrupted."""
        for group, parameters in self._members:
            group["params"] = parameters
        for states, parameter, delta in self._swaps:
            assert delta is not None
            delta.grad = None
            if delta in states:
                states[parameter] = states[delta]
                del states[delta]
