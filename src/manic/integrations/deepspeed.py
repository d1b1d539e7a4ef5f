"""DeepSpeed's ZeRO with several param groups or sub-groups: one step, and one scale, for the whole model.

ZeRO-1 and 2 step their optimizer once for each param group, ZeRO-3 once for each sub-group. A step of Mechanic learns
from all parameters together. So the first of these calls keep their gradients, and the last one takes the step for all.
No method of DeepSpeed is replaced; the attributes that are read here have no underscore.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from manic.mechanic import Mechanic

__all__ = ["whole_model_steps"]


def whole_model_steps(engine: Any) -> None:
    """Let the Mechanic in a DeepSpeed engine take one step for all param groups and sub-groups together.

    Call it once on every rank, after ``deepspeed.initialize``. Where DeepSpeed steps the whole model at once it changes
    nothing. Otherwise the gradients of this rank's partitions, in float32, are in memory together during a step.

    Args:
        engine: A DeepSpeed engine with :class:`~manic.Mechanic`, declared ``plain="sharded"``, as its optimizer.

    Raises:
        TypeError: if it is no engine, or there is no Mechanic in it, or its ZeRO has steps of another form: ZenFlow,
            SuperOffload and NVMe have.
    """
    from deepspeed import DeepSpeedEngine

    if not isinstance(engine, DeepSpeedEngine):
        raise TypeError(
            f"expected a DeepSpeed engine, got {type(engine).__name__}: pass what deepspeed.initialize returns, or the "
            "model that accelerator.prepare returns. Accelerate prepares no engine where it is told to use the CPU"
        )
    zero = engine.optimizer
    mechanic = zero if isinstance(zero, Mechanic) else getattr(zero, "optimizer", None)
    if isinstance(mechanic, _StepOfParts):
        return
    if not isinstance(mechanic, Mechanic):
        raise TypeError(
            f"the engine has no Mechanic, but a {type(zero).__name__} with a {type(mechanic).__name__}: pass "
            'optimizer=Mechanic(base, plain="sharded") to deepspeed.initialize'
        )
    parts = _parts_of(zero)
    if parts is not None and len(parts.masters) > 1:
        zero.optimizer = _StepOfParts(mechanic, parts)


class _Parts(Protocol):
    """What ZeRO steps one after the other: this rank's partitions of param groups, or of sub-groups."""

    @property
    def masters(self) -> Sequence[Tensor]:
        """The flat parameters that the optimizer has, in the order in which they are stepped."""

    @property
    def groups(self) -> Sequence[int]:
        """The param group of each."""

    @property
    def are_hidden(self) -> bool:
        """Whether param groups are empty between steps."""

    @property
    def copies(self) -> Sequence[Tensor]:
        """What the model's parameters are made of; DeepSpeed copies each master there after its call of ``step``."""

    def link(self, state: Any) -> None:
        """Show the state, which exists now, where ``deepspeed.utils.safe_get_full_optimizer_state`` looks for it."""


class _ParamGroups:
    """The parts of ZeRO-1 and 2.

    Args:
        zero: DeepSpeed's optimizer.
    """

    are_hidden = False

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    @property
    def masters(self) -> Sequence[Tensor]:
        found: Sequence[Tensor] = self._zero.single_partition_of_fp32_groups
        return found

    @property
    def groups(self) -> Sequence[int]:
        return range(len(self.masters))

    @property
    def copies(self) -> Sequence[Tensor]:
        by_group = zip(self._zero.parallel_partitioned_bit16_groups, self._zero.real_dp_process_group)
        return [partitions[dist.get_rank(group)] for partitions, group in by_group]

    def link(self, state: Any) -> None:
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for parameters, master in zip(self._zero.bit16_groups, self.masters):
            lazy_init_hp_params_optimizer_state(parameters, master, state)


class _SubGroups:
    """The parts of ZeRO-3.

    Args:
        zero: DeepSpeed's optimizer.
    """

    are_hidden = True

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    @property
    def masters(self) -> Sequence[Tensor]:
        found: Sequence[Tensor] = self._zero.fp32_partitioned_groups_flat
        return found

    @property
    def groups(self) -> Sequence[int]:
        of_sub_group = self._zero.sub_group_to_group_id
        return [of_sub_group[index] for index in range(len(self.masters))]

    @property
    def copies(self) -> Sequence[Tensor]:
        found: Sequence[Tensor] = self._zero.fp16_partitioned_groups_flat
        return found

    def link(self, state: Any) -> None:
        """Nothing: it is looked up in the optimizer."""


def _parts_of(zero: Any) -> _Parts | None:
    """The parts that ``zero`` steps one by one; ``None`` if it steps the whole model.

    Raises:
        TypeError: if that is not known.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    kind = type(zero)
    if kind in (BF16_Optimizer, FP16_Optimizer, FP16_UnfusedOptimizer) or isinstance(zero, Mechanic):
        return None
    if kind is DeepSpeedZeroOptimizer and not zero.zenflow:
        return _ParamGroups(zero)
    if kind is DeepSpeedZeroOptimizer_Stage3 and not (
        zero.zenflow or zero.swap_optimizer or zero.params_in_nvme_and_cpu
    ):
        return _SubGroups(zero)
    raise TypeError(
        f"{kind.__name__} with these settings takes steps of another form than ZeRO-1, 2 and 3 on a device or a CPU, "
        "so that Mechanic cannot step the whole model at once: switch off ZenFlow, SuperOffload and NVMe"
    )


class _StepOfParts:
    """Stands in ZeRO for a Mechanic: ``step`` is called for each part, and steps with the last for all.

    Everything else is the Mechanic's.

    Args:
        optimizer: The Mechanic.
        parts: What ZeRO steps one after the other.
    """

    def __init__(self, optimizer: Mechanic, parts: _Parts) -> None:
        self.optimizer = optimizer
        self._parts = parts
        self._shown: list[dict[str, Any]] | None = None
        self._gradients: list[Tensor | None] = []
        self._is_linked = False

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["optimizer"], name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The Mechanic's; during ZeRO-1's or 2's call of ``step`` only the one that it has assigned."""
        return self.optimizer.param_groups if self._shown is None else self._shown

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        ours = self.optimizer.param_groups
        if len(groups) == 1 < len(ours) and any(groups[0] is each for each in ours):
            self._shown = groups
            return
        self._shown = None
        if [id(each) for each in groups] != [id(each) for each in ours]:
            self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The Mechanic's."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the Mechanic's."""
        self._is_linked = False
        self.optimizer.load_state_dict(state_dict)

    @torch.no_grad()
    def step(self) -> None:
        """Keep the gradient of the part that is shown; with that of the last part, step.

        Raises:
            RuntimeError: on every rank alike, if the parts come in another order than ZeRO has them.
        """
        masters = self._parts.masters
        (shown,) = (parameter for group in self.param_groups for parameter in group["params"])
        if shown is masters[0]:
            self._gradients.clear()  # an error may have ended an earlier step in the middle
        if shown is not masters[len(self._gradients)]:
            raise RuntimeError(
                f"ZeRO has not stepped its partitions in their order: number {len(self._gradients)} of {len(masters)} "
                "was expected. Give the model one param group and one sub-group, which need no whole_model_steps"
            )
        self._gradients.append(shown.grad)
        if len(self._gradients) < len(masters):
            return
        try:
            with self._all_shown(masters):
                self.optimizer.step()
        except BaseException:
            self._hide()
            raise
        for master, copy in zip(masters, self._parts.copies):
            if copy.data_ptr() != master.data_ptr():  # ZeRO-3 in float32 has no copies
                copy.copy_(master)
        if not self._is_linked:  # DeepSpeed does it after its first call of step, when no part had a state
            self._parts.link(self.state)
            self._is_linked = True

    def _hide(self) -> None:
        """Show what there is between steps, as DeepSpeed does after a call of ``step`` that has not raised."""
        self._shown = None
        for group in self.optimizer.param_groups if self._parts.are_hidden else ():
            group["params"] = []

    @contextmanager
    def _all_shown(self, masters: Sequence[Tensor]) -> Iterator[None]:
        """Give the Mechanic all parts, with their gradients."""
        groups, of_master = self.optimizer.param_groups, self._parts.groups
        members = [group["params"] for group in groups]
        gradients = [master.grad for master in masters]
        try:
            for master, gradient in zip(masters, self._gradients):
                master.grad = gradient
            for index, group in enumerate(groups):
                group["params"] = [master for master, place in zip(masters, of_master) if place == index]
            yield
        finally:
            self._gradients.clear()
            for group, parameters in zip(groups, members):
                group["params"] = parameters
            for master, gradient in zip(masters, gradients):
                master.grad = gradient
