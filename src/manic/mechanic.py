"""Mechanic: Algorithm 1 of Cutkosky, Defazio and Mehta (NeurIPS 2023, arXiv 2306.00144) on sharded parameters.

:meth:`Mechanic.step` is the algorithm, for every tuner. Data goes one way through it: local shards (step/plan.py),
partial sums and their all_reduce (step/sums.py), the tuner (tuners/), the scale, and parameters (step/rules.py,
step/capture.py). optimizer/wrapper.py does what torch expects of an optimizer, and optimizer/state.py keeps what exists
between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from manic.distributed.deepspeed import clear_padding
from manic.distributed.join import JoinGuard
from manic.distributed.layout import EXPERT_PARALLEL, Layout, Plain
from manic.distributed.startup import Agreement
from manic.optimizer.consistency import compare_exchanged, compare_loaded, raise_if_drifted
from manic.optimizer.local_step import step_on_shards
from manic.optimizer.names import GROUP_KEY, STATE_KEYS
from manic.optimizer.positions import PositionCheck
from manic.optimizer.state import MechanicState
from manic.optimizer.supported import check_bases, closure_explained
from manic.optimizer.transaction import hidden, transaction
from manic.optimizer.wrapper import OptimizerWrapper
from manic.step.base_step import base_step
from manic.step.deferral import Deferral, left_out_on_device
from manic.step.guard import Guard, Nonfinite, Reading
from manic.step.monitor import Monitor
from manic.step.plan import Plan, Planner
from manic.step.references import follow
from manic.step.survey import Survey
from manic.tuners.base import Proposal, Tuner
from manic.tuners.registry import DEFAULT, check_scale, make_tuner

__all__ = ["Mechanic"]


class Mechanic(OptimizerWrapper):
    """Learns the scale of any first-order optimizer's learning rate while it trains.

    The base optimizer keeps its schedule, weight decay and groups; its ``lr`` may be 1.0. The parameters may be
    DTensors on any mesh, FSDP1's, or plain. The scale is the one that a single process would compute.

    Args:
        optimizer: The base optimizer, or several over disjoint parameters. A param group with
            ``"expert_parallel": True`` declares that its parameters may differ between ranks outside of their own
            meshes; how many ranks hold each is counted at the first step, by values and gradients, and again in the
            next 31 steps while no gradient confirms it.
        betas: Decay factors of the tuner's averages, each in (0, 1). Default: the variant's, 0.99 or the paper's six.
        s_init: With ``"multiplicative"`` the length of the first step over that of the parameters, by default 3e-4;
            else the initial scale, by default the variant's, 1e-6 or 1e-8. Positive.
        s_decay: lambda of the paper, by default 0.01; ``"multiplicative"`` does not have it.
        eps: Added to denominators, by default 1e-8; ``"multiplicative"`` does not have it.
        variant: ``"multiplicative"``, manic's own tuner; ``"optax"``, what the paper's experiments ran; ``"pytorch"``,
            mechanic-pytorch 0.0.1; or a :class:`manic.tuners.base.Tuner`.
        scale: ``"global"``: all param groups share one scale. ``"per group"``: each has its own, learned from its
            parameters alone; the published variants do not have that. All ranks must have equally many groups, of
            which some may be empty: those at the same place share their scale.
        store_delta: Keep Delta, one copy of the parameters in at least float32. Otherwise it is recomputed as
            ``(x - x_ref) / (S + eps)``, as both published implementations do: inexact in the first steps, and in
            low precision. Default: with ``"multiplicative"`` only of parameters in low precision, else yes.
        process_group: All ranks that hold the model between them. Default: all ranks there are.
        plain: ``"replicated"`` if tensors that are no DTensors are the same on all ranks (DDP), ``"sharded"`` if
            each rank holds other ones (inside ``ZeroRedundancyOptimizer``). FSDP1's are recognised by themselves.
        pipeline_stages: Into how many stages a pipeline splits ``process_group``.
        update: How the base optimizer's update is taken: ``"auto"``, or ``"snapshot"`` for any optimizer, or
            ``"decoupled"`` / ``"coupled"`` for one whose update does not depend on where the parameters are, apart from
            weight decay of that kind. ``variant="pytorch"`` always takes a snapshot.
        nonfinite: What to do with gradients that are not finite anywhere, on any rank. ``"raise"``: every rank raises
            the same error, before anything has changed. ``"skip"``: every rank leaves the step out, and counts it in
            ``metrics()``. Both make the host wait for the all_reduce before the base optimizer steps; ``"skip"`` only
            where that cannot leave out a step on the device, as torch's fused optimizers can. ``"ignore"``: no wait,
            the base optimizer gets what there is, and only the tuner is kept finite.
        s_max: The largest scale. Default: no bound, and a warning if the scale seems to have run away.
        check_every: After how many steps to call :meth:`check_consistency`; 0: never.

    Raises:
        TypeError: if ``optimizer`` is no optimizer, or one that Mechanic cannot scale.
        ValueError: if an argument is out of its range, the variant does not have an option, or there is nothing to
            train.
    """

    STATE_KEYS = STATE_KEYS
    GROUP_KEY = GROUP_KEY
    LIVE_KEYS = (EXPERT_PARALLEL,)

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        betas: Sequence[float] | None = None,
        s_init: float | None = None,
        s_decay: float | None = None,
        eps: float | None = None,
        variant: str | Tuner = DEFAULT,
        scale: str = "global",
        store_delta: bool | None = None,
        process_group: ProcessGroup | None = None,
        plain: Plain = "replicated",
        pipeline_stages: int = 1,
        update: str = "auto",
        nonfinite: Nonfinite = "raise",
        s_max: float | None = None,
        check_every: int = 0,
    ) -> None:
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        check_bases(optimizers, may_be_empty=plain == "sharded")
        if not isinstance(check_every, int) or isinstance(check_every, bool) or check_every < 0:
            raise ValueError(f"check_every must be a number of steps, or 0, got {check_every!r}")
        self._check_every, self._calls = check_every, 0
        self._guard = Guard(nonfinite)
        self._tuner = make_tuner(variant, betas=betas, s_init=s_init, s_decay=s_decay, eps=eps, s_max=s_max)
        check_scale(scale, self._tuner)
        self._layout = Layout(process_group, plain, pipeline_stages)
        per_group = scale == "per group"
        self._state = MechanicState(optimizers, self._tuner, self._layout, store_delta, per_group=per_group)
        self._survey = Survey(self._state, self._guard)
        self._planner = Planner(
            optimizers, self._tuner, self._state.rule, self._layout, self._state,
            update=update, knows_scale=self._guard.waits,
        )  # fmt: skip
        self._monitor = Monitor(self._state.tuner_state, self._tuner.settings)
        self._agreement, self._join = Agreement(self._layout), JoinGuard()
        self._positions = PositionCheck(optimizers)
        super().__init__(optimizers, self._state)
        self._share_global_state()

    # It steers by what the host knows, which a compiler cannot follow.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_norm: float | Tensor | None = None) -> Any:
        """Take one step of Algorithm 1. Every rank of the process group must call it, with gradients or without.

        Args:
            closure: Computes the gradients and returns the loss; called once, with gradients enabled.
            grad_norm: A norm of all gradients, as ``torch.nn.utils.clip_grad_norm_`` returns it. ``"raise"`` and
                ``"skip"`` take it for whether they are finite, and do not read every gradient for that. Only where
                early sums are of a sample, or are not made in this step, is there anything to save.

        Returns:
            What ``closure`` returned, or ``None``.

        Raises:
            TypeError, ValueError: before anything has changed, if a gradient is sparse or complex, or the ranks do not
                hold what they are said to, or the parameters are not those of a loaded state, or were exchanged. In
                one of the first 16 steps, on every rank alike, if a base optimizer steps from a position of its own:
                parameters and tuner are as before the step then.
            NonfiniteError: before anything has changed, on every rank alike, if a gradient or parameter is not finite.
            RuntimeError: on every rank alike, if ``check_every`` finds something; on every rank that has inputs, before
                anything has changed, inside ``DistributedDataParallel.join()``.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        if self._creates_state():
            return loss
        state, survey = self._state, self._survey
        is_first = state.begin()
        with transaction(self.optimizers, is_first, state.restorer()) as taken, self._planner.plan() as plan:
            self._settle(plan)
            compare_loaded(state)
            defers = survey.may_defer(plan) and not self._positions.are_due
            pending = survey.begin(plan, grad_norm, defers=defers, is_repeated=self._is_capturing)
            proposal, reading, is_left_out = None, None, None
            if defers:
                proposal, is_left_out = left_out_on_device(survey.propose(pending))
            elif self._guard.waits:
                if (decided := survey.decide(plan, pending, grad_norm)) is None:
                    state.tuner_state.skip()
                    self._monitor.step_skipped(self._layout.is_first_rank)
                    return loss
                proposal, reading = decided
            elif plan.takes_scale:
                proposal = survey.propose(pending)
            if self._positions.are_due and not self._is_capturing:
                self._positions.ask(plan.captures, self.param_groups)
            scales = survey.scales(plan, proposal, reading)
            with base_step(plan.captures, scales, taken.is_committed, is_left_out):
                with hidden(self.optimizers), closure_explained():
                    for base in self.optimizers:
                        step_on_shards(base)
                self._refuse_positions(plan)
                if proposal is None:  # the all_reduce was hidden behind the base optimizers' step
                    proposal = survey.propose(pending)
                proposal, known = survey.refine(plan, proposal, reading)
                state.rule.write(plan.captures, proposal.scale)
                state.commit(proposal, known)
                taken.commit()
            self._finish(plan, proposal, reading, defers=defers)
        return loss

    def _creates_state(self) -> bool:
        """Create what a checkpoint is to have, and return True, where this call is no step of the run.

        That is a call by torch's checkpointing, which wants to see the state, and any before the first gradient.
        """
        is_for_checkpoint = self._state.is_creating(self._has_state())
        if not is_for_checkpoint:
            self._check()
            if self._state.started or self._is_capturing or not self._state.has_no_gradient():
                return False
            self._monitor.step_without_gradient(self._layout.is_first_rank)
        if not self._has_state() and any(p.grad is not None for group in self.param_groups for p in group["params"]):
            with self._planner.plan():
                self._state.create()
            self._planner.drop()
        return True

    def _check(self) -> None:
        """Do the checks that come before a step, on all ranks."""
        self._join.refuse(parameter for group in self.param_groups for parameter in group["params"])
        self._share_global_state()
        if self._check_every and self._calls and self._calls % self._check_every == 0:
            self.check_consistency()
        self._calls += 1
        self._agree()
        if self._is_capturing:
            self._guard.refuse_capture()
        home = self._state.home_device
        if self._state.tuner_state.device != home:  # the model was moved after the optimizer was built
            self._state.tuner_state.to(home)
            self._put_global_state()

    def _refuse_positions(self, plan: Plan) -> None:
        """Raise TypeError on all ranks if a base optimizer has stepped from a position of its own."""
        if self._positions.are_due and not self._is_capturing:
            groups, group, device = self.param_groups, self._layout.group, self._state.communication_device
            self._positions.raise_if_found(plan.captures, groups, group, device)

    def _settle(self, plan: Plan) -> None:
        """Inform the monitor of the last step, if the host did not wait for it."""
        if (last := self._survey.settle(plan)) is None:
            return
        proposal, reading = last
        if reading.is_finite:
            self._inform(proposal, reading)
        else:
            self._monitor.step_skipped(self._layout.is_first_rank)

    def _finish(self, plan: Plan, proposal: Proposal, reading: Reading | None, *, defers: bool) -> None:
        """Move references, and inform the monitor."""
        is_capturing, plan.was_taken = self._is_capturing, True
        self._state.count_update(is_counted=not is_capturing)
        if defers:
            self._state.deferral = Deferral(proposal, is_counted=True)
        follow(plan.captures, proposal.shares, is_finite=reading is not None)
        if defers:
            self._monitor.show(proposal)
        elif not is_capturing:
            self._inform(proposal, reading)

    def _inform(self, proposal: Proposal, reading: Reading | None) -> None:
        scales, lrs = (None, None) if reading is None else (reading.scales, reading.sums.get("lr"))
        self._monitor.step_taken(proposal, scales, self.param_groups, self._layout.is_first_rank, lrs)

    def _agree(self) -> None:
        """Compare with the other ranks, at the first step, after a load, and when parameters were added."""
        if self._agreement.holds_for(self.param_groups) and not self._state.was_loaded:
            return
        if self._state.was_loaded:
            self._agreement.forget()
            self._state.complete_loaded()
        check_bases(self.optimizers, may_be_empty=True)
        if self._layout.group is not None:
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            self._join.find(parameters)
            self._join.refuse(parameters)
        settings = f"a run that {self._state.stands}, {self._settings(of_stage=False)}"
        bases = [type(optimizer).__name__ for optimizer in self.optimizers]
        of_stage = f"base optimizers {bases}, update={self._planner.updates}"
        device, dtype = self._state.communication_device, self._state.tuner_state.parts[0].dtype
        self._planner.drop()
        if not self._agreement.renew(self.param_groups, settings, of_stage, device, dtype):
            return
        try:
            if self._layout.plain == "sharded":
                clear_padding(self.param_groups)
            compare_exchanged(self._state)
        except BaseException:
            self._agreement.forget()
            raise
        self._positions.agree(self._layout.group, device)

    @torch.no_grad()
    def check_consistency(self) -> None:
        """Verify that ranks which should hold the same do, bit for bit, and that parameters are where they were put.

        Compared over the process group are the tuner with its S, the param groups' settings, and of every parameter of
        which there are copies the value, references and Delta. Every rank must call it, between steps. It reads
        everything once, and waits for the device.

        Raises:
            RuntimeError: on every rank alike, with the first rank and parameter that differ; or if something else has
                changed a parameter since the last step (not seen where Delta is not stored).
        """
        self._share_global_state()
        raise_if_drifted(self._state)

    @property
    def scale(self) -> Tensor:
        """S, the factor learned for the learning rate: a new tensor on the parameters' device, no sync.

        It is 0-dim, or, with a scale per group, of shape [groups], in the order of ``param_groups``.
        """
        self._share_global_state()  # ZeroRedundancyOptimizer loads by writing into the groups
        return self._state.tuner_state.scale

    @torch.no_grad()
    def rebase(self) -> None:
        """Go on from where the parameters are now: references = x and Delta = 0, with the scale and the tuner kept.

        To be called on every rank after parameters were changed by anything but this optimizer: weights clipped,
        averaged or exchanged, a model loaded without its optimizer. The step would undo such a change otherwise.
        """
        self._share_global_state()
        self._state.rebase()

    @overload
    def metrics(self, *, to_host: Literal[False] = False) -> dict[str, Tensor]: ...

    @overload
    def metrics(self, *, to_host: Literal[True]) -> dict[str, float]: ...

    def metrics(self, *, to_host: bool = False) -> dict[str, Tensor] | dict[str, float]:
        """What to log, the same on every rank; no communication.

        Args:
            to_host: Whether to return floats, with one host sync, instead of 0-dim tensors on the parameters' device,
                with none.

        Returns:
            ``scale``; ``h``, ``grad_norm`` and ``param_norm`` of the last step in which the tuner made its sums, over
            the whole model, estimated where the tuner sums over samples (nan before the first; with ``"pytorch"``
            ``param_norm`` is that of x as the base optimizer left it); with a scale per group ``scale/<i>`` and
            ``h/<i>`` of each; ``nonfinite_steps``, how many steps were left out, or under ``"ignore"`` not learned
            from; ``effective_lr/<i>``, S * lr of param group i of this rank, which other stages of a pipeline may not
            have.
        """
        self._share_global_state()
        metrics = self._monitor.metrics(self.param_groups)
        if not to_host:
            return metrics
        together = torch.stack([each.to(metrics["nonfinite_steps"]) for each in metrics.values()])
        return dict(zip(metrics, together.tolist()))

    @property
    def _is_capturing(self) -> bool:
        return self._state.tuner_state.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _settings(self, *, of_stage: bool = True) -> str:
        """In words; without what only the ranks of a pipeline stage have alike, if not ``of_stage``."""
        shape = self._state.tuner_state.shape
        mine = {
            "scale": f"for each of {shape[0]} param groups" if shape else "global",
            **self._tuner.settings, "store_delta": self._state.store_delta, "nonfinite": self._guard.nonfinite,
            "check_every": self._check_every, "update": self._planner.updates,
        }  # fmt: skip
        if not of_stage:
            del mine["update"]
        return ", ".join([f"variant={self._tuner.name}", *(f"{name}={value}" for name, value in mine.items())])
