"""Mechanic: Algorithm 1 of Cutkosky, Defazio and Mehta (NeurIPS 2023, arXiv 2306.00144) on sharded parameters.

:meth:`Mechanic.step` is the algorithm. What the ranks hold is layout.py's business, the sums are reduction.py's, the
scale is tuner.py's, and taking the base optimizer's update is displacement.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from manic.agreement import agree, raise_together
from manic.displacement import Iterate, batches, resolve_update, show, stepping, strays, write_back
from manic.kernels import Kernels, compiled, plain, working_dtype
from manic.layout import Layout, Plain, local, local_gradient
from manic.reduction import PartialSums, Reduction
from manic.tuner import Tuner
from manic.wrapper import OptimizerWrapper, is_creating_state

__all__ = ["Mechanic"]

X_REF = "mechanic_x_ref"
DELTA = "mechanic_delta"
# The number of updates in a saved tuner whose checkpoint holds no training yet, only the shape of its state.
_PLACEHOLDER = -1.0


class Mechanic(OptimizerWrapper):
    """Learns the scale of any first-order optimizer's learning rate while it trains.

    The base optimizer keeps its schedule, weight decay and groups; its ``lr`` may be 1.0. The parameters may be
    DTensors on any mesh, FSDP1's, or plain. The scale is the one that a single process would compute.

    Args:
        optimizer: The base optimizer, or several over disjoint parameters, which then share one scale.
        betas: Decay factors of the tuner's averages, each in (0, 1).
        s_init: Initial scale, positive. Default: the variant's, 1e-6 or 1e-8.
        s_decay: lambda of the paper.
        eps: Added to denominators.
        variant: ``"optax"``, what the paper's experiments ran, or ``"pytorch"``, mechanic-pytorch 0.0.1.
        store_delta: Keep Delta, one copy of the parameters in at least float32. Otherwise it is recomputed as
            ``(x - x_ref) / (S + eps)``, as both published implementations do: inexact in the first steps, and in
            low precision.
        process_group: All ranks that hold the model between them. Default: all ranks there are.
        plain: ``"replicated"`` if tensors that are no DTensors are the same on all ranks (DDP), ``"sharded"`` if
            each rank holds other ones (inside ``ZeroRedundancyOptimizer``). FSDP1's are recognised by themselves.
        pipeline_stages: Into how many stages a pipeline splits ``process_group``.
        update: How the base optimizer's update is taken: ``"auto"``, or ``"snapshot"`` for any optimizer, or
            ``"decoupled"`` / ``"coupled"`` for one whose update does not depend on where the parameters are, apart from
            weight decay of that kind. ``variant="pytorch"`` always takes a snapshot.
        compile: Compile the step's sums and writes with ``torch.compile`` at the first step, so that each takes one
            pass over memory on any device. The base optimizer's own step stays as it is.

    Raises:
        TypeError: if ``optimizer`` is no optimizer, or one that Mechanic cannot scale.
        ValueError: if an argument is out of its range, or there is nothing to train.
    """

    STATE_KEYS = (X_REF, DELTA)
    GROUP_KEY = "mechanic"

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        betas: Sequence[float] = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999),
        s_init: float | None = None,
        s_decay: float = 0.01,
        eps: float = 1e-8,
        variant: str = "optax",
        store_delta: bool = True,
        process_group: ProcessGroup | None = None,
        plain: Plain = "replicated",
        pipeline_stages: int = 1,
        update: str = "auto",
        compile: bool = False,
    ) -> None:
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        _check_bases(optimizers, may_be_empty=plain == "sharded")
        self._tuner = Tuner(betas, s_init, s_decay, eps, variant)
        self._layout = Layout(process_group, plain, pipeline_stages)
        self._store_delta = bool(store_delta)
        self._compile = bool(compile)
        snapshot = self._tuner.variant.x_after_base_step
        # Optimizers whose source is known take any tensor for the parameter; another may know its own by other ways.
        self._hands_over_delta = update == "auto"
        self._updates = ["snapshot" if snapshot else resolve_update(base, update) for base in optimizers]
        self._state_is_placeholder = False
        # Which bases' state is a placeholder then, see _create_state; those that came with a state keep theirs.
        self._came_with_state = [bool(base.state) for base in optimizers]
        self._placeholders = [not came for came in self._came_with_state]
        self._created: list[dict[Any, Any] | None] = [None for _ in optimizers]
        self._started = False
        self._was_loaded = False
        self._agreed_on: list[list[int]] | None = None
        super().__init__(optimizers)
        self._tuner.to(self._home_device())
        self._share_global_state()

    # It steers by what the host knows; its arithmetic is compiled apart, if asked for.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of Algorithm 1.

        Every rank of the process group must call it, with gradients or without. Apart from the first step there is
        one collective, an all_reduce of four numbers, and the host waits for nothing on the device.

        Args:
            closure: Computes the gradients and returns the loss; called once, with gradients enabled.

        Returns:
            What ``closure`` returned, or ``None``.

        Raises:
            TypeError: if a gradient is sparse or complex.
            ValueError: at the first step, if the ranks do not hold what they are said to; at the first step after a
                load, if the parameters are not those that the loaded state belongs to.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        iterates = self._prepare()
        if iterates is None:  # checkpointing wants a state to be created, and nothing else
            return loss
        shards, sums = batches(iterates), PartialSums(self._kernels)
        if self._tuner.variant.x_after_base_step:
            with stepping(shards, sums.add_gradient):
                self._step_bases()
                show(shards, sums.add_position)
                write_back(shards, self._tuner.update(self._reduce(sums).wait()), self._kernels)
        else:
            with stepping(shards, sums.add):
                reduction = self._reduce(sums)
                self._step_bases()  # the all_reduce hides behind it
                write_back(shards, self._tuner.update(reduction.wait()), self._kernels)
        return loss

    @property
    def scale(self) -> Tensor:
        """S, the factor learned for the learning rate: a new 0-dim tensor on the parameters' device, no sync."""
        self._share_global_state()  # ZeroRedundancyOptimizer loads by writing into the groups
        return self._tuner.scale

    @torch.no_grad()
    def rebase(self) -> None:
        """Go on from where the parameters are now: x_ref = x and Delta = 0, with the scale and the tuner kept.

        To be called after parameters were changed by anything but this optimizer: weights clipped, averaged or
        exchanged, a model loaded without its optimizer. The step would undo such a change otherwise.
        """
        self._share_global_state()
        for parameter, state in self.state.items():
            if X_REF in state:
                local(state[X_REF]).copy_(local(parameter))
            if DELTA in state:
                local(state[DELTA]).zero_()
        self._was_loaded = False

    def metrics(self) -> dict[str, Tensor]:
        """What to log: 0-dim tensors on the parameters' device, the same on every rank; no sync, no communication.

        Returns:
            ``scale``; ``h``, ``grad_norm`` and ``param_norm`` of the last step, over the whole model (nan before
            the first); ``effective_lr/<i>``, S * lr of param group i.
        """
        scale, sums = self.scale, self._tuner.sums
        metrics = {
            "scale": scale,
            "h": self._tuner.h.clone(),
            "grad_norm": sums.grad_square.sqrt(),
            "param_norm": sums.x_square.sqrt(),
        }
        for index, group in enumerate(self.param_groups):
            metrics[f"effective_lr/{index}"] = scale * group.get("lr", 1.0)
        return metrics

    def _step_bases(self) -> None:
        with self._own_state_hidden():
            for optimizer in self.optimizers:
                optimizer.step()

    def _reduce(self, sums: PartialSums) -> Reduction:
        device = self._layout.communication_device(self._tuner.state.device)
        return Reduction(sums.total(self._tuner.state), self._layout.group, device)

    def _prepare(self) -> list[Iterate] | None:
        """Everything that the first step has to do, and the local shards of this one."""
        creating = not self._has_state() and is_creating_state()
        if not creating:
            self._share_global_state()
            self._agree()
            if not self._started:
                self._drop_placeholders()
            self._started = True
        home = self._home_device()
        if self._tuner.state.device != home:
            self._tuner.to(home)  # the model was moved after the optimizer was built
            self._put_global_state()

        scale = self._tuner.state[3].sum()
        scales = {home: scale}
        iterates = []
        for optimizer, update in zip(self.optimizers, self._updates):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    iterate = self._iterate(optimizer, group, parameter, update, scales)
                    if iterate is not None:
                        iterates.append(iterate)
        if creating:
            self._create_state(iterates)
            return None
        if self._was_loaded:
            self._check_loaded(iterates)
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
        if not never_moved:
            self._complete(state, parameter, scales[x.device])
        if update == "by group":
            update = "decoupled" if group.get("decoupled_weight_decay", False) else "coupled"
        delta = state[DELTA] if self._store_delta and not never_moved else None
        stands_in = self._hands_over_delta and update != "snapshot" and delta is not None and delta.dtype == x.dtype
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
            eps=self._tuner.eps,
            never_moved=never_moved,
        )

    def _complete(self, state: dict[str, Any], parameter: Tensor, scale: Tensor) -> None:
        """Make ``state`` hold x_ref, and Delta where it is stored: new ones, or what a load left of them."""
        dtype = working_dtype(parameter)
        starts_here = X_REF not in state
        if starts_here:
            state[X_REF] = parameter.detach().clone()
        elif state[X_REF].dtype != parameter.dtype:
            state[X_REF] = state[X_REF].to(parameter.dtype)
        if not self._store_delta or starts_here:
            state.pop(DELTA, None)
        if self._store_delta and DELTA not in state:
            state[DELTA] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            if not starts_here:  # saved with store_delta=False
                delta = (local(parameter).to(dtype) - local(state[X_REF])) / (scale + self._tuner.eps).to(dtype)
                local(state[DELTA]).copy_(delta)
        elif self._store_delta and state[DELTA].dtype != dtype:
            state[DELTA] = state[DELTA].to(dtype)

    def _agree(self) -> None:
        """Compare notes with the other ranks, at the first step and when parameters were added."""
        # By group: inside of ZeRO, a rank may be given a new group that is empty.
        identities = [[id(parameter) for parameter in group["params"]] for group in self.param_groups]
        if identities == self._agreed_on:
            return
        _check_bases(self.optimizers, may_be_empty=True)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        device = self._layout.communication_device(self._home_device())
        agree(parameters, self._settings(), self._layout, device, self._tuner.state.dtype)
        self._agreed_on = identities

    def _check_loaded(self, iterates: list[Iterate]) -> None:
        """Refuse a state that the parameters do not belong to: the step would put them back where it says."""
        astray = strays(iterates, any_scale=not self._tuner.variant.moves_without_gradient)
        complaint = ""
        if astray:
            shape = tuple(iterates[astray[0]].parameter.shape)
            complaint = (
                f"{len(astray)} of {len(iterates)} parameters, the first of shape {shape}, are not where the loaded "
                "optimizer state says (x_ref + S * Delta). Load the model from the same checkpoint; read a checkpoint "
                "of the base optimizer alone before the first step, or by load_state_dict; if the parameters were "
                "changed on purpose, call rebase() before the step"
            )
        device = self._layout.communication_device(self._home_device())
        raise_together(ValueError, complaint, self._layout.group, device)
        self._was_loaded = False

    def _create_state(self, iterates: list[Iterate]) -> None:
        """Let base optimizers without a state create it, and change nothing else.

        Theirs then counts a step that was none. It is a placeholder that shows a checkpoint what names and shapes
        there are, is marked as one in the tuner's state, and is made again at the first real step.
        """
        with self._own_state_hidden():
            self._placeholders = [not optimizer.state for optimizer in self.optimizers]
            for optimizer, placeholder in zip(self.optimizers, self._placeholders):
                if placeholder:
                    optimizer.step()
                    self._state_is_placeholder = True
        for iterate in iterates:
            iterate.x.copy_(iterate.x_ref)
        if self._state_is_placeholder:
            self._tuner.state[4].fill_(_PLACEHOLDER)
        self._created = [
            self._imprint(optimizer) if placeholder else None
            for optimizer, placeholder in zip(self.optimizers, self._placeholders)
        ]

    def _imprint(self, optimizer: Optimizer) -> dict[Any, Any]:
        """What tells a base's state that a step with zero gradients made from one that has seen training."""
        return {
            (parameter, name): local(value).item() if local(value).numel() == 1 else int(local(value).count_nonzero())
            for parameter, state in optimizer.state.items()
            for name, value in state.items()
            if name not in self.STATE_KEYS and isinstance(value, Tensor)
        }

    def _is_as_created(self, optimizer: Optimizer, created: dict[Any, Any] | None) -> bool:
        """Whether no checkpoint of the base alone was read into what was created, which leaves the tuner as it was."""
        # Entries may be gone: FSDP1 loads none of a parameter that this rank holds nothing of.
        return created is None or self._imprint(optimizer).items() <= created.items()

    def _drop_placeholders(self) -> None:
        """Forget what was only made to be looked at: a run starts from where its parameters are now."""
        for optimizer, placeholder in zip(self.optimizers, self._placeholders):
            if self._state_is_placeholder and placeholder:
                optimizer.state.clear()
            for state in optimizer.state.values():
                for key in self.STATE_KEYS:
                    state.pop(key, None)
        if self._state_is_placeholder:
            self._tuner.reset()
        self._state_is_placeholder = False

    def _has_state(self) -> bool:
        return self._started or super()._has_state()

    def _global_state(self) -> Tensor:
        return self._tuner.state

    def _check_global_state(self, saved: Tensor) -> None:
        self._tuner.check(saved)

    def _load_global_state(self, saved: Tensor | None) -> None:
        if saved is None:
            self._tuner.reset()
            self._state_is_placeholder = self._started = self._was_loaded = False
        else:
            self._tuner.load(saved)
            updates = float(self._tuner.updates)
            self._state_is_placeholder = updates == _PLACEHOLDER
            self._started = self._was_loaded = updates > 0
            if self._state_is_placeholder:
                self._placeholders = [
                    not came_with_state and self._is_as_created(optimizer, created)
                    for optimizer, came_with_state, created in zip(
                        self.optimizers, self._came_with_state, self._created
                    )
                ]

    @property
    def _kernels(self) -> Kernels:
        return compiled() if self._compile else plain()

    def _home_device(self) -> torch.device:
        """The device of the first parameter; of the process group's backend where this rank has none."""
        for group in self.param_groups:
            for parameter in group["params"]:
                return local(parameter).device
        return self._layout.communication_device(torch.device("cpu"))

    def _settings(self) -> str:
        tuner = self._tuner
        return (
            f"variant={tuner.variant.name}, betas={tuner.betas}, s_init={tuner.s_init}, s_decay={tuner.s_decay}, "
            f"eps={tuner.eps}, store_delta={self._store_delta}"
        )


# What cannot be wrapped, by the name of a class in torch.optim, and why.
_UNSUPPORTED = {
    "LBFGS": "it is no first-order optimizer: a step evaluates the loss at many points",
    "SparseAdam": "its gradients are sparse; use Adam with dense gradients",
}


def _check_bases(optimizers: list[Optimizer], may_be_empty: bool) -> None:
    if not optimizers:
        raise ValueError("Mechanic needs at least one optimizer to wrap, got an empty list")
    seen: set[int] = set()
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Mechanic wraps torch.optim.Optimizer objects, got {type(optimizer).__name__}")
        if isinstance(optimizer, Mechanic):
            raise TypeError("the optimizer is a Mechanic already; wrap the base optimizer once")
        for cls in type(optimizer).__mro__:
            if cls.__module__.startswith("torch.optim") and cls.__name__ in _UNSUPPORTED:
                raise TypeError(f"Mechanic cannot wrap {cls.__name__}: {_UNSUPPORTED[cls.__name__]}")
            if cls.__name__ == "ZeroRedundancyOptimizer":
                raise TypeError(
                    "Mechanic goes inside of ZeroRedundancyOptimizer: pass "
                    'optimizer_class=mechanize(AdamW, plain="sharded")'
                )
        for group in optimizer.param_groups:
            if group.get("differentiable", False):
                raise ValueError("differentiable=True is not supported: Mechanic's step cannot be differentiated")
            for parameter in group["params"]:
                if parameter.is_complex():
                    raise TypeError(
                        f"a parameter of shape {tuple(parameter.shape)} is complex; Mechanic needs real ones"
                    )
                if id(parameter) in seen:
                    raise ValueError(
                        f"a parameter of shape {tuple(parameter.shape)} is in more than one group; each must be in one"
                    )
                seen.add(id(parameter))
    trainable = any(p.requires_grad for base in optimizers for group in base.param_groups for p in group["params"])
    if not trainable and not may_be_empty:
        raise ValueError("no parameter requires a gradient; there is nothing to train")
