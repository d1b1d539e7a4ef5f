"""Mechanic: Algorithm 1 of Cutkosky, Defazio and Mehta (NeurIPS 2023, arXiv 2306.00144) on sharded parameters.

:meth:`Mechanic.step` is the algorithm. What the ranks hold is layout.py's business, the sums are reduction.py's, the
scale is the tuner's (betting.py, multiplying.py), and taking the base optimizer's update is displacement.py's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from manic.distributed.drift import differences
from manic.distributed.layout import Layout, Plain, local, local_gradient
from manic.distributed.startup import agree
from manic.optimizer.state import DELTA, X_REF, MechanicState
from manic.optimizer.supported import check_bases
from manic.step.capture import (
    Batch,
    Iterate,
    batches,
    resolve_update,
    scaled_learning_rates,
    show,
    stepping,
    write_back,
)
from manic.step.guard import NonfiniteError, account_of_nonfinite
from manic.step.kernels import Kernels, compiled, exact, plain
from manic.step.monitor import INTERVAL, PATIENCE, Watch
from manic.step.multiplied import MultipliedStep, largest_lr
from manic.step.sums import PartialSums, Reduction
from manic.tuners.base import Held, Reading, Sums
from manic.tuners.multiplicative import Multiplying
from manic.tuners.registry import make_tuner

__all__ = ["Mechanic", "Nonfinite"]

Nonfinite = Literal["raise", "skip", "ignore"]
"""What a step does with gradients that are not finite."""

logger = logging.getLogger(__name__)

# In the place of a tensor that a parameter has not got.
_ABSENT = torch.empty(0)


class Mechanic(MechanicState):
    """Learns the scale of any first-order optimizer's learning rate while it trains.

    The base optimizer keeps its schedule, weight decay and groups; its ``lr`` may be 1.0. The parameters may be
    DTensors on any mesh, FSDP1's, or plain. The scale is the one that a single process would compute.

    Args:
        optimizer: The base optimizer, or several over disjoint parameters, which then share one scale.
        betas: Decay factors of the tuner's averages, each in (0, 1). Default: the variant's, the paper's six or 0.99.
        s_init: Initial scale, positive. Default: the variant's, 1e-6 or 1e-8. With ``"multiplicative"`` it is the
            length of the first step over that of the parameters, by default 1e-4.
        s_decay: lambda of the paper; nothing with ``"multiplicative"``.
        eps: Added to denominators; nothing with ``"multiplicative"``.
        variant: ``"optax"``, what the paper's experiments ran; ``"pytorch"``, mechanic-pytorch 0.0.1; or
            ``"multiplicative"``, manic's own tuner, which in the median ends nearest to the best of a sweep.
        store_delta: Keep Delta, one copy of the parameters in at least float32. Otherwise it is recomputed as
            ``(x - x_ref) / (S + eps)``, as both published implementations do: inexact in the first steps, and in
            low precision. Default: yes; with ``"multiplicative"`` only of parameters in low precision.
        process_group: All ranks that hold the model between them. Default: all ranks there are.
        plain: ``"replicated"`` if tensors that are no DTensors are the same on all ranks (DDP), ``"sharded"`` if
            each rank holds other ones (inside ``ZeroRedundancyOptimizer``). FSDP1's are recognised by themselves.
        pipeline_stages: Into how many stages a pipeline splits ``process_group``.
        update: How the base optimizer's update is taken: ``"auto"``, or ``"snapshot"`` for any optimizer, or
            ``"decoupled"`` / ``"coupled"`` for one whose update does not depend on where the parameters are, apart from
            weight decay of that kind. ``variant="pytorch"`` always takes a snapshot.
        compile: Compile the step's sums and writes with ``torch.compile`` at the first step, so that each takes one
            pass over memory on any device. The base optimizer's own step stays as it is.
        nonfinite: What to do with gradients that are not finite anywhere, on any rank. ``"raise"``: every rank raises
            the same error, before anything has changed. ``"skip"``: every rank leaves the step out, and counts it in
            ``metrics()``. Both make the host wait for the all_reduce before the base optimizer steps. ``"ignore"``: no
            wait, the base optimizer gets what there is, and only the tuner is kept finite.
        s_max: The largest scale. Default: no bound, and a warning if the scale seems to have run away.
        check_every: After how many steps to call :meth:`check_consistency`; 0: never.

    Raises:
        TypeError: if ``optimizer`` is no optimizer, or one that Mechanic cannot scale.
        ValueError: if an argument is out of its range, or there is nothing to train.
    """

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        betas: Sequence[float] | None = None,
        s_init: float | None = None,
        s_decay: float = 0.01,
        eps: float = 1e-8,
        variant: str = "optax",
        store_delta: bool | None = None,
        process_group: ProcessGroup | None = None,
        plain: Plain = "replicated",
        pipeline_stages: int = 1,
        update: str = "auto",
        compile: bool = False,
        nonfinite: Nonfinite = "raise",
        s_max: float | None = None,
        check_every: int = 0,
    ) -> None:
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        check_bases(optimizers, may_be_empty=plain == "sharded")
        if nonfinite not in get_args(Nonfinite):
            raise ValueError(f"nonfinite must be one of {get_args(Nonfinite)}, got {nonfinite!r}")
        if not isinstance(check_every, int) or isinstance(check_every, bool) or check_every < 0:
            raise ValueError(f"check_every must be a number of steps, or 0, got {check_every!r}")
        self._compile = bool(compile)
        self._nonfinite, self._check_every = nonfinite, check_every
        tuner = make_tuner(variant, betas=betas, s_init=s_init, s_decay=s_decay, eps=eps, s_max=s_max)
        # Optimizers whose source is known take any tensor for the parameter; another may know its own by other ways.
        self._hands_over_delta = update == "auto"
        snapshot = tuner.variant.x_after_base_step
        self._multiplied: MultipliedStep | None = None
        if isinstance(tuner, Multiplying):
            self._multiplied = MultipliedStep(tuner, may_scale=update == "auto" and nonfinite != "ignore")
        if store_delta is None and not tuner.variant.multiplies:
            store_delta = True
        self._updates = ["snapshot" if snapshot else resolve_update(base, update) for base in optimizers]
        self._agreed_on: list[list[int]] | None = None
        self._watch = Watch()
        # Calls of step() in this process, how many it has left out in a row, and S when the host last heard of it.
        self._calls, self._in_a_row, self._last_scale = 0, 0, 0.0
        super().__init__(optimizers, tuner, Layout(process_group, plain, pipeline_stages), store_delta)

    # It steers by what the host knows; its arithmetic is compiled apart, if asked for.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of Algorithm 1.

        Every rank of the process group must call it, with gradients or without. Apart from the first step there is
        one collective, an all_reduce of four numbers (six with ``variant="multiplicative"``, and one more until there
        is an update to take the first scale from); with ``variant="pytorch"``, unless ``nonfinite="ignore"``, there
        are two, and one more where sums of gradients or parameters are 0 or out of float32's range. Whatever is raised,
        parameters hold x_ref + S * Delta, and the tuner is as it was; with ``variant="multiplicative"`` an error inside
        of the base optimizer's step may leave parameters where that has moved them, and one where it goes back after
        the step may leave some of them back and others not.

        Args:
            closure: Computes the gradients and returns the loss; called once, with gradients enabled.

        Returns:
            What ``closure`` returned, or ``None``.

        Raises:
            TypeError: if a gradient is sparse or complex.
            ValueError: at the first step, if the ranks do not hold what they are said to; at the first step after a
                load, if the parameters are not those that the loaded state belongs to (not seen where Delta is not
                stored).
            NonfiniteError: on every rank alike, if a gradient is not finite anywhere and ``nonfinite="raise"``, or a
                parameter is not and ``nonfinite`` is not ``"ignore"``.
            RuntimeError: on every rank alike, if ``check_every`` finds something.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        if self._is_creating_state():  # checkpointing wants that, and nothing else
            self._create_state([(iterate.x, iterate.x_ref) for iterate in self._iterates()])
            return loss
        is_first = self._begin()
        known, before, taken = self._parameters_with_state(), self._tuner.hold(), False
        had_scale = self._multiplied is not None and self._multiplied.has_scale
        try:
            iterates = self._iterates()
            self._check_loaded()
            if self._nonfinite == "ignore":
                self._step_at_once(batches(iterates))
                taken = True
            else:
                taken = self._step_if_sound(batches(iterates), iterates, before)
        except BaseException:
            self._tuner.put_back(before)
            if self._multiplied is not None:
                self._multiplied.has_scale = had_scale
            raise
        finally:
            if not taken:
                self._forget(known, is_first)
        if taken and self._multiplied is not None:
            self._multiplied.look_back(iterates, self._is_capturing)
        self._look_at_scale(taken)
        return loss

    def _step_at_once(self, shards: Sequence[Batch]) -> None:
        """Algorithm 1, in which the all_reduce hides behind the base optimizers' step."""
        sums = PartialSums(self._kernels, self._tuner.variant.multiplies)
        if self._tuner.variant.x_after_base_step:
            with stepping(shards, sums.add_gradient):
                self._step_bases()
                show(shards, sums.add_position)
                self._finish(shards, self._reduce(sums).wait())
        else:
            with stepping(shards, sums.add):
                reduction = self._reduce(sums)
                self._step_bases()
                self._finish(shards, reduction.wait())

    def _step_if_sound(self, shards: Sequence[Batch], iterates: Sequence[Iterate], before: Held) -> bool:
        """Algorithm 1, or nothing at all and False: the sums are known to all ranks before anything changes."""
        sums = self._survey(shards, iterates, before)
        if sums is None:
            return False
        with stepping(shards):
            if self._multiplied is not None:  # has learned already
                with scaled_learning_rates(iterates, self._last_scale):
                    self._step_bases()
                self._write(shards, self._tuner.scale, sums)
                return True
            self._step_bases()
            if self._tuner.variant.x_after_base_step:
                position = PartialSums(self._kernels)
                show(shards, position.add_position)
                late = self._reduce(position).wait()
                sums = sums._replace(delta_dot=late.delta_dot, x_square=late.x_square)
            self._finish(shards, sums)
        return True

    def _finish(self, shards: Sequence[Batch], sums: Sums) -> None:
        """S_{t+1} and x_{t+1}, after the base step."""
        self._write(shards, self._tuner.update(sums), sums)

    def _write(self, shards: Sequence[Batch], scale: Tensor, sums: Sums) -> None:
        """x_{t+1}, after the base step, at S_{t+1}."""
        if self._multiplied is not None:
            self._multiplied.write(shards, scale, sums.x_square, self._kernels, self._reduce)
        else:
            write_back(shards, scale, self._kernels)

    def _survey(self, shards: Sequence[Batch], iterates: Sequence[Iterate], before: Held) -> Sums | None:
        """The sums that can be known before the base step, waited for; ``None`` if they say to skip it.

        Where the scale is on updates, the tuner has learned from them, so that one wait tells the host that, too.
        """
        if self._is_capturing:
            raise RuntimeError(
                f"a step with nonfinite={self._nonfinite!r} cannot be captured in a CUDA graph: the host waits for its "
                'sums. Pass nonfinite="ignore"'
            )
        early = self._tuner.variant.x_after_base_step
        looks = (self._kernels, exact())
        for kernels in looks:
            partial = PartialSums(kernels, self._tuner.variant.multiplies)
            show(shards, partial.add_gradient if early else partial.add)
            sums = self._reduce(partial).wait()
            of_tuner = [self._tuner.scale] if self._multiplied is None else self._multiplied.learn(sums)
            numbers = torch.stack([*sums, *of_tuner]).tolist()  # one wait for all
            reading, self._last_scale = Reading(*numbers[: len(sums)]), numbers[len(sums)]
            if self._multiplied is not None:
                self._multiplied.has_fallen = bool(numbers[-1])
            is_last = kernels is looks[-1]
            if reading.is_in_range(with_position=not early) or (is_last and reading.is_finite):
                return sums
            self._tuner.put_back(before)  # it may have learned from what was out of range
        if not math.isfinite(reading.lr):
            raise NonfiniteError(f"step {int(self._tuner.updates) + 1} was not taken: a learning rate is {reading.lr}")
        if self._nonfinite == "skip" and self._position_is_finite(shards, reading):
            self._tuner.skip()
            return None
        account = account_of_nonfinite(iterates, self.describe, self._layout.group)
        raise NonfiniteError(
            f"step {int(self._tuner.updates) + 1} was not taken, for its sums are not finite. {account}. Parameters, "
            'optimizer and tuner are as before it. nonfinite="skip" leaves out steps with such gradients; parameters '
            "that are not finite are no step's to mend: go back to a checkpoint"
        )

    def _position_is_finite(self, shards: Sequence[Batch], reading: Reading) -> bool:
        """Whether parameters and Delta are, of which the gradients then are the only ones that are not."""
        if self._tuner.variant.x_after_base_step:
            position = PartialSums(exact())
            show(shards, position.add_position)
            reading = self._reduce(position).wait().read()
        return math.isfinite(reading.delta_dot) and math.isfinite(reading.x_square)

    def _look_at_scale(self, taken: bool) -> None:
        """Speak, once, of what cannot be right."""
        if self._is_capturing:
            return
        self._in_a_row = 0 if taken else self._in_a_row + 1
        messages = [self._watch.skipping(self._in_a_row)]
        if taken:
            if self._nonfinite == "ignore" and (self._calls == PATIENCE or self._calls % INTERVAL == 0):
                self._last_scale = float(self._tuner.scale)
            lrs = [group.get("lr", 1.0) for group in self.param_groups]
            largest = max((float(lr) for lr in lrs if not isinstance(lr, Tensor) or lr.is_cpu), default=0.0)
            messages.append(self._watch.running(self._last_scale, largest, self._tuner.s_max))
            if self._calls == PATIENCE and not self._tuner.has_gained():
                messages.append(self._watch.stuck(self._last_scale, self._tuner.s_init, int(self._tuner.updates)))
        for message in filter(None, messages):
            if self._layout.is_first_rank:  # all ranks have the same to say
                logger.warning(message)

    @torch.no_grad()
    def check_consistency(self) -> None:
        """Verify that ranks which should hold the same do, bit for bit, and that parameters are where they were put.

        Compared over the process group are the tuner with its S, the param groups' settings, and of every parameter of
        which there are copies the value, x_ref and Delta. Every rank must call it, between steps. It reads everything
        once, and waits for the device.

        Raises:
            RuntimeError: on every rank alike, with the first rank and parameter that differ; or if something else has
                changed a parameter since the last step (not seen where Delta is not stored).
        """
        self._share_global_state()
        held = [
            (parameter, name, self.state.get(parameter, {}).get(key, _ABSENT) if key else parameter)
            for group in self.param_groups
            for parameter in group["params"]
            for name, key in (("the value", None), ("x_ref", X_REF), ("Delta", DELTA))
        ]
        device = self._layout.communication_device(self._home_device())
        found = differences(self._tuner.state, self.param_groups, held, self._layout, device, self.describe)
        if found:
            raise RuntimeError(
                f"ranks have drifted apart: {found}. Go back to a checkpoint from before that; nothing in a sound run "
                "changes parameters or settings on one rank alone"
            )
        if self._started:
            self._raise_if_astray(
                RuntimeError,
                "since the last step something else has changed them, which the next step will undo; if it was on "
                "purpose, call rebase() after such a change",
            )

    @property
    def scale(self) -> Tensor:
        """S, the factor learned for the learning rate: a new 0-dim tensor on the parameters' device, no sync."""
        self._share_global_state()  # ZeroRedundancyOptimizer loads by writing into the groups
        return self._tuner.scale

    @torch.no_grad()
    def rebase(self) -> None:
        """Go on from where the parameters are now: x_ref = x and Delta = 0, with the scale and the tuner kept.

        To be called on every rank after parameters were changed by anything but this optimizer: weights clipped,
        averaged or exchanged, a model loaded without its optimizer. The step would undo such a change otherwise.
        """
        self._share_global_state()
        for parameter, state in self.state.items():
            if X_REF in state:
                local(state[X_REF]).copy_(local(parameter))
            if DELTA in state:
                local(state[DELTA]).zero_()
        self._tuner.rebased()
        self._was_loaded = False

    def metrics(self) -> dict[str, Tensor]:
        """What to log: 0-dim tensors on the parameters' device, the same on every rank; no sync, no communication.

        Returns:
            ``scale``; ``h``, ``grad_norm`` and ``param_norm`` of the last step, over the whole model (nan before
            the first); ``nonfinite_steps``, how many steps were left out, or under ``"ignore"`` not learned from;
            ``effective_lr/<i>``, S * lr of param group i.
        """
        scale, sums = self.scale, self._tuner.sums
        metrics = {
            "scale": scale,
            "h": self._tuner.h.clone(),
            "grad_norm": sums.grad_square.sqrt(),
            "param_norm": sums.x_square.sqrt(),
            "nonfinite_steps": self._tuner.nonfinite.clone(),
        }
        for index, group in enumerate(self.param_groups):
            metrics[f"effective_lr/{index}"] = scale * group.get("lr", 1.0)
        return metrics

    def _load_global_state(self, saved: Tensor | None) -> None:
        super()._load_global_state(saved)
        if self._multiplied is not None:
            self._multiplied.resume()

    def _step_bases(self) -> None:
        with self._own_state_hidden():
            for optimizer in self.optimizers:
                optimizer.step()

    def _reduce(self, sums: PartialSums) -> Reduction:
        device = self._layout.communication_device(self._tuner.state.device)
        lr = largest_lr(self.param_groups) if self._multiplied is not None else None
        return Reduction(sums.total(self._tuner.state, lr), self._layout.group, device)

    def _begin(self) -> bool:
        """What has to be settled before a step, over all ranks; whether the run is yet to begin."""
        self._share_global_state()
        if self._check_every and self._calls and self._calls % self._check_every == 0:
            self.check_consistency()
        self._calls += 1
        self._agree()
        is_first = not self._started
        if is_first:
            self._drop_placeholders()
            if self._multiplied is not None:
                self._multiplied.resume()
            self._started = True
        return is_first

    def _iterates(self) -> list[Iterate]:
        home = self._home_device()
        if self._tuner.state.device != home:
            self._tuner.to(home)  # the model was moved after the optimizer was built
            self._put_global_state()
        scales = {home: self._tuner.position[0]}
        iterates = []
        for optimizer, update in zip(self.optimizers, self._updates):
            updates = [update] * len(optimizer.param_groups)
            if self._multiplied is not None:
                updates = self._multiplied.updates_of(optimizer, update, self._keeps_delta)
            for group, update in zip(optimizer.param_groups, updates):
                for parameter in group["params"]:
                    iterate = self._iterate(optimizer, group, parameter, update, scales)
                    if iterate is not None:
                        iterates.append(iterate)
        return iterates

    def _iterate(
        self,
        optimizer: Optimizer,
        group: dict[str, Any],
        parameter: Tensor,
        update: str,
        scales: dict[torch.device, Tensor],
    ) -> Iterate | None:
        """The local shard of ``parameter`` with its x_ref and Delta, or ``None`` if the step leaves it alone."""
        gradient = local_gradient(parameter)
        if gradient is None and not parameter.requires_grad:
            # Frozen: it stays where it is, and starts anew from there if it is ever trained again.
            for key in self.STATE_KEYS:
                optimizer.state.get(parameter, {}).pop(key, None)
            return None
        x = local(parameter)
        if x.device not in scales:
            scales[x.device] = next(iter(scales.values())).to(x.device)
        if gradient is None and not self._tuner.variant.moves_without_gradient:
            return None
        # Without a gradient so far, x is x_ref and Delta is 0. Nothing is stored: base optimizers, and their loaders,
        # have no state for such a parameter either.
        never_moved = gradient is None and X_REF not in optimizer.state.get(parameter, {})
        state = {X_REF: parameter} if never_moved else optimizer.state.setdefault(parameter, {})
        # Where a snapshot is taken in every step, the first is memory that the next ones find there.
        once = self._tuner.variant.multiplies and self._nonfinite != "ignore"
        starts_here = once and X_REF not in state
        if not never_moved:
            self._complete(state, parameter, scales[x.device])
        if update == "by group":
            update = "decoupled" if group.get("decoupled_weight_decay", False) else "coupled"
        delta = state[DELTA] if self._keeps_delta(parameter) and not never_moved else None
        multiplies = self._tuner.variant.multiplies
        stands_in = (
            self._hands_over_delta
            and not multiplies
            and update != "snapshot"
            and delta is not None
            and delta.dtype == x.dtype
        )
        return Iterate(
            optimizer=optimizer,
            group=group,
            parameter=parameter,
            update=update,  # type: ignore[arg-type]
            x=x,
            gradient=gradient,
            x_ref=local(state[X_REF]),
            delta=None if delta is None else local(delta),
            stand_in=delta if stands_in else None,
            replicas=self._layout.replicas(parameter),
            scale=scales[x.device],
            eps=self._tuner.position[1],
            starts_here=starts_here,
            never_moved=never_moved,
        )

    def _agree(self) -> None:
        """Compare notes with the other ranks: at the first step, after a load, and when parameters were added."""
        # By group: inside of ZeRO, a rank may be given a new group that is empty.
        identities = [[id(parameter) for parameter in group["params"]] for group in self.param_groups]
        if identities == self._agreed_on and not self._was_loaded:
            return
        check_bases(self.optimizers, may_be_empty=True)
        device = self._layout.communication_device(self._home_device())
        names = [type(optimizer).__name__ for optimizer in self.optimizers]
        run = "begins"
        if self._started:
            run = f"goes on after {int(self._tuner.updates)} steps with S={float(self._tuner.scale)!r}"
        settings = f"a run of {names} that {run}, {self._settings()}"
        agree(self.param_groups, settings, self._layout, device, self._tuner.state.dtype)
        self._agreed_on = identities

    @property
    def _is_capturing(self) -> bool:
        return self._tuner.state.is_cuda and torch.cuda.is_current_stream_capturing()

    @property
    def _kernels(self) -> Kernels:
        return compiled() if self._compile else plain()

    def _settings(self) -> str:
        tuner = self._tuner
        return (
            f"variant={tuner.variant.name}, betas={tuner.betas}, s_init={tuner.s_init}, s_decay={tuner.s_decay}, "
            f"eps={tuner.eps}, s_max={tuner.s_max}, store_delta={self._store_delta}, nonfinite={self._nonfinite}, "
            f"check_every={self._check_every}, update={self._updates}, compile={self._compile}"
        )
