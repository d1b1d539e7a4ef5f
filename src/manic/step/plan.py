"""The list of local shards that a step works on, with a capture for each batch: made once, and kept while it holds.

It knows which parameters there are and how they are held, and does no arithmetic on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from manic.distributed.layout import Layout, check_gradient, is_expert_parallel, local_storage
from manic.distributed.sample import FRACTION
from manic.optimizer.kinds import (
    decay_is_decoupled,
    is_fused,
    is_known,
    is_proportional,
    keeps_place,
    resolve_update,
)
from manic.step.capture import Capture, NoUpdate, ScaledLearningRate
from manic.step.held import Frozen
from manic.step.position import Position
from manic.step.rules import Means, Rule
from manic.step.shards import Shard, in_batches
from manic.tuners.base import Tuner

__all__ = ["Displacements", "Plan", "Planner"]


class Displacements(Protocol):
    """What gives a parameter its references and Delta; see :class:`manic.optimizer.state.MechanicState`."""

    @property
    def position(self) -> Position:
        """Where parameters are, at S_t."""

    @property
    def has_scale(self) -> tuple[bool, ...]:
        """Of the one S, or of that of each param group: whether the host knows that it is not 0."""

    @property
    def is_per_group(self) -> bool:
        """Whether each param group has an S of its own."""

    @property
    def started(self) -> bool:
        """Whether the run has begun."""

    def keeps_delta(self, parameter: Tensor) -> bool:
        """Whether Delta of ``parameter`` is stored."""

    def is_sampled(self, parameter: Tensor) -> bool:
        """Whether a sample stands for ``parameter`` in early sums."""

    def found(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[list[Tensor | None]]:
        """What is stored under parameters: a list for each reference, x_ref first, and for Delta; ``None``: not."""

    def join(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Let the references of parameters lie side by side in memory, in this order."""

    def complete(self, optimizer: Optimizer, parameter: Tensor, position: Position) -> None:
        """Store references, and Delta where it is kept: new ones, or what a load left of them."""


@dataclass
class Plan:
    """What a step works on."""

    shards: list[Shard]
    captures: list[Capture]
    key: list[Any]
    """What it was made for."""
    can_be_left_out: bool
    """Whether the base optimizers leave a step out by a flag on the device, and nothing else would change x."""
    was_taken: bool = False
    """Whether a step with it was taken, so that base optimizers have all of their state."""

    @property
    def takes_scale(self) -> bool:
        """Whether S goes into a learning rate, and must be there before the base optimizers step."""
        return any(isinstance(capture, ScaledLearningRate) for capture in self.captures)


class Planner:
    """Makes the plan, and makes it again when something that it depends on has changed.

    Args:
        optimizers: The base optimizers.
        tuner: Declares which parameters are in the plan, and whether x is read as the base optimizer leaves it.
        rule: Chooses captures.
        layout: Tells how many ranks hold an element.
        displacements: Gives references and Delta.
        update: The user's choice, see :func:`manic.optimizer.kinds.resolve_update`.
        knows_scale: Whether the host knows S before the base optimizers step.

    Raises:
        ValueError: if ``update`` is unknown.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        tuner: Tuner,
        rule: Rule,
        layout: Layout,
        displacements: Displacements,
        *,
        update: str,
        knows_scale: bool,
    ) -> None:
        self._optimizers, self._rule, self._layout, self._displacements = optimizers, rule, layout, displacements
        self._tuner, self._knows_scale = tuner, knows_scale
        # Optimizers whose source is known take any tensor for the parameter; another may know its own in other ways.
        self._is_auto = update == "auto"
        reads_x = not {"delta_x", "x_square"}.isdisjoint(tuner.late_sums)  # as only a snapshot shows it
        resolved = [resolve_update(base, update) for base in optimizers]
        if reads_x and update not in ("auto", "snapshot"):
            raise ValueError(f"variant {tuner.name!r} always takes a snapshot; leave out update={update!r}")
        self.updates = ["snapshot" for _ in resolved] if reads_x else resolved
        """How each base optimizer's update is taken, in words."""
        self._plan: Plan | None = None

    def drop(self) -> None:
        """Make another plan at the next step."""
        self._plan = None

    @contextmanager
    def plan(self) -> Iterator[Plan]:
        """Hold the plan of a step inside.

        Raises:
            TypeError: if a gradient is sparse or complex.
        """
        position, has_scale = self._displacements.position, self._displacements.has_scale
        is_new = self._plan is None or self._plan.key != self._key(has_scale)
        if self._plan is None or is_new:
            self._plan = self._make(position, has_scale)
        plan = self._plan
        try:
            for capture in plan.captures:
                capture.begin(position)
            yield plan
        finally:
            for capture in plan.captures:
                capture.end()
            for shard in plan.shards if is_new else ():
                shard.is_new = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None}  # a copy of the optimizer has parameters of its own

    def _key(self, has_scale: tuple[bool, ...]) -> list[Any]:
        """What the plan depends on. It holds the groups and parameters that it names, so no others have their ids."""
        key: list[Any] = [has_scale, self._displacements.started, self._layout.world_size]
        for optimizer in self._optimizers:
            key.append(is_proportional(optimizer))
            for group in optimizer.param_groups:
                key += (
                    id(group),
                    group.get("fused"),
                    bool(group.get("momentum")),
                    group.get("decoupled_weight_decay"),
                    group.get("maximize"),
                    keeps_place(group),
                )
                parameters = group["params"]
                shards = [local_storage(parameter) for parameter in parameters]
                # A list for each: of many parameters that takes a fraction of the time of a tuple for each parameter.
                key += (
                    [id(parameter) for parameter in parameters],
                    [parameter.requires_grad for parameter in parameters],
                    [parameter.grad is None for parameter in parameters],
                    [x.shape for x in shards],
                    [x.dtype for x in shards],
                    [x.device for x in shards],
                    *(
                        [None if each is None else each.dtype for each in row]
                        for row in self._displacements.found(optimizer, parameters)
                    ),
                )
        return key

    def _make(self, position: Position, has_scale: tuple[bool, ...]) -> Plan:
        shards: list[Shard] = []
        kinds: dict[int, type[Capture]] = {}
        members = [
            (optimizer, update, group)
            for optimizer, update in zip(self._optimizers, self.updates)
            for group in optimizer.param_groups
        ]
        for index, (optimizer, update, group) in enumerate(members):
            column = index if self._displacements.is_per_group else 0
            means = self._means(optimizer, group, update, has_scale[column])
            found = [self._shard(optimizer, group, column, each, update, position) for each in group["params"]]
            mine = [shard for shard in found if shard is not None]
            keeps_delta = [self._displacements.keeps_delta(p) for p in group["params"] if p.requires_grad]
            for shard, capture in zip(mine, self._rule.captures(mine, means, keeps_delta)):
                kinds[id(shard)] = capture
            shards += mine
        captures = [kinds[id(batch[0])](batch) for batch in in_batches(shards, kinds)]
        for each in captures:
            if len(each.shards) > 1 and each.first.has_state:
                self._displacements.join(each.first.optimizer, [shard.parameter for shard in each.shards])
        can_be_left_out = any(type(each) is ScaledLearningRate for each in captures) and all(
            isinstance(each, (NoUpdate, Frozen))
            or (isinstance(each, ScaledLearningRate) and is_fused(each.first.optimizer, each.first.group))
            for each in captures
        )
        return Plan(shards, captures, self._key(has_scale), can_be_left_out)

    def _means(self, optimizer: Optimizer, group: dict[str, Any], update: str, has_scale: bool) -> Means:
        return Means(
            # Whether another optimizer holds positions of its own is seen only where x is real in its first step.
            depends_on_x=update == "snapshot" or not (self._displacements.started or is_known(optimizer)),
            steps_on_any_tensor=self._is_auto,
            rests_at_zero=is_proportional(optimizer),
            takes_scale=(
                self._is_auto
                and (self._knows_scale or is_fused(optimizer, group))
                and has_scale
                and update != "snapshot"
                and not self._tuner.late(has_scale)
                and is_proportional(optimizer)
            ),
        )

    def _shard(
        self,
        optimizer: Optimizer,
        group: dict[str, Any],
        column: int,
        parameter: Tensor,
        update: str,
        position: Position,
    ) -> Shard | None:
        """The local shard of ``parameter``, or ``None`` if the step leaves it alone."""
        gradient = parameter.grad
        before = self._displacements.found(optimizer, [parameter])[0][0]
        is_frozen = gradient is None and not parameter.requires_grad
        if is_frozen and before is None:
            return None
        if gradient is None and not is_frozen and not self._tuner.moves_without_gradient:
            return None
        # Without a gradient so far, x is x_ref and Delta is 0. Nothing is stored: base optimizers, and their loaders,
        # have no state for such a parameter either.
        has_state = gradient is not None or before is not None
        if gradient is not None:
            check_gradient(parameter, gradient)  # before anything is stored
        if has_state:
            self._displacements.complete(optimizer, parameter, position)
        is_sampled = self._displacements.is_sampled(parameter)
        replicas = self._layout.replicas(parameter, is_declared=is_expert_parallel(group))
        return Shard(
            find=self._displacements.found,
            optimizer=optimizer,
            group=group,
            parameter=parameter,
            column=column,
            weight=(FRACTION if is_sampled else 1) / replicas,
            replicas=replicas,
            decay_is_decoupled=decay_is_decoupled(update, group),
            has_state=has_state,
            is_new=before is None,
            is_sampled=is_sampled,
            is_frozen=is_frozen,
            is_held=not is_frozen and keeps_place(group),
        )
