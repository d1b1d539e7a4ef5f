"""An Optimizer around other optimizers: one list of param groups, one state, one state dict.

Implements what torch and its checkpointing expect of an optimizer, independent of the step.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from manic.optimizer.joint import JointDefaults, JointGroups, JointState, assign_groups, assign_state, parameter_states
from manic.optimizer.own_state_dict import extra_entries, has_own_state_dict
from manic.optimizer.references import is_of_sample

__all__ = ["OptimizerWrapper", "OwnState", "is_creating_state"]


class OwnState(Protocol):
    """A wrapper's own state for the whole model, in tensors that param groups store: all the same one, or parts."""

    @property
    def parts(self) -> Sequence[Tensor]:
        """The tensor that each param group stores."""

    @property
    def is_per_group(self) -> bool:
        """Whether each stores another one."""

    @property
    def exists(self) -> bool:
        """Whether every state that a checkpoint needs exists, even if ``state`` is empty."""

    def check(self, saved: Tensor) -> None:
        """Raise ValueError if ``saved`` cannot be loaded."""

    def load(self, found: Sequence[Tensor | None]) -> None:
        """Copy saved tensors, one for each group, into the parts; all ``None``: the checkpoint has none of them."""

    def take(self, found: Sequence[Tensor | None]) -> None:
        """Follow what the groups store now: their parts, in another order, loaded tensors, ``None`` in new groups."""


def is_creating_state() -> bool:
    """Whether ``torch.distributed.checkpoint`` runs the current step only to create the optimizer's state.

    ``get_optimizer_state_dict`` and ``set_optimizer_state_dict`` do that with zero gradients and a learning rate of 0.
    The values alone do not show it: a warm-up starts at 0 too, and a rank's gradients may all be zero.
    """
    from torch.distributed.checkpoint import state_dict

    # The function has no public name; tests/optimizer/test_wrapper.py fails if it is renamed.
    code = getattr(getattr(state_dict, "_init_optim_state", None), "__code__", None)
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


class OptimizerWrapper(Optimizer):
    """A ``torch.optim.Optimizer`` that wraps one or several others.

    Param groups are always the base optimizers' own dicts, so a scheduler may hold the wrapper or a base.
    A subclass stores per-parameter tensors in ``state`` under :attr:`STATE_KEYS`, and tensors for the whole model in
    the param groups under :attr:`GROUP_KEY`, where checkpointing finds them on every rank.

    Args:
        optimizers: The base optimizers, over disjoint parameters.
        own: The tensors for the whole model.
    """

    STATE_KEYS: tuple[str, ...] = ()
    GROUP_KEY: str = ""
    LIVE_KEYS: tuple[str, ...] = ()
    """Keys of param groups that describe the program and not the run: a load leaves them as they are."""

    def __init__(self, optimizers: Sequence[Optimizer], own: OwnState) -> None:
        # Optimizer.__init__ would create separate groups and state; __setstate__ creates the rest.
        self.optimizers = list(optimizers)
        self._own, self._shared = own, False
        super().__setstate__({})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizers' param groups, in their order; not copies. May be assigned, as with torch's optimizers.

        Raises:
            ValueError: if groups are assigned that are not the base optimizers', where there are several.
        """
        if len(self.optimizers) == 1:
            return self.optimizers[0].param_groups
        return JointGroups(self.optimizers, self._assign_groups)

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._assign_groups(groups)

    def _assign_groups(self, groups: list[dict[str, Any]]) -> None:
        assign_groups(self.optimizers, groups)
        self._follow_groups()
        self._put_global_state()

    @property  # type: ignore[override]
    def state(self) -> MutableMapping[Any, Any]:
        """The base optimizers' state and the wrapper's, by parameter. May be assigned, as with torch's optimizers."""
        return JointState(self.optimizers, self._has_state)

    @state.setter
    def state(self, state: MutableMapping[Any, Any]) -> None:
        assign_state(self.optimizers, state)

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults; of several, those that they have in common, which cannot be changed."""
        return self.optimizers[0].defaults if len(self.optimizers) == 1 else JointDefaults(self.optimizers)

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        if len(self.optimizers) > 1:
            raise TypeError(
                "the defaults of several base optimizers cannot be assigned together: set a base optimizer's"
            )
        self.optimizers[0].defaults = defaults

    @property
    def own_keys(self) -> frozenset[str]:
        """Keys of ``state`` and param groups that a checkpoint may lack; the wrapper continues without, or is reset."""
        return frozenset((*self.STATE_KEYS, self.GROUP_KEY))

    def check_param_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Check that the param groups of a saved state dict can be loaded; changes nothing.

        Args:
            groups: The saved param groups.

        Raises:
            ValueError: if the wrapper's settings in them do not fit.
        """
        self._follow_groups()
        checked = set[int]()
        for group in groups:
            saved = group.get(self.GROUP_KEY)
            if saved is not None and id(saved) not in checked:
                self._own.check(saved)
                checked.add(id(saved))

    def _has_state(self) -> bool:
        found = (key in state for _, _, state in parameter_states(self.optimizers) for key in self.STATE_KEYS)
        return self._own.exists or any(found)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group to the base optimizer.

        Args:
            param_group: As for ``torch.optim.Optimizer.add_param_group``.

        Raises:
            ValueError: with several base optimizers; call ``add_param_group`` on the one that should own the group.
        """
        if len(self.optimizers) > 1:
            names = ", ".join(type(optimizer).__name__ for optimizer in self.optimizers)
            raise ValueError(
                f"the wrapper has several base optimizers ({names}): call add_param_group on the one that should own "
                f"the group; {type(self).__name__} includes the group in its next step"
            )
        self.optimizers[0].add_param_group(param_group)
        self._share_global_state()

    def _share_global_state(self) -> None:
        """Store the wrapper's tensors in groups that lack them; adopt those that a base optimizer has loaded."""
        found = self._stored()
        if self._shared and found and all(each is None for each in found):
            self._own.load(found)  # a base optimizer loaded a plain state dict
        else:
            self._own.take(found)
        self._put_global_state()

    def _follow_groups(self) -> None:
        if self._own.is_per_group:
            self._own.take(self._stored())

    def _stored(self) -> list[Tensor | None]:
        found = (group.get(self.GROUP_KEY) for group in self.param_groups)
        return [each if isinstance(each, Tensor) else None for each in found]

    def _put_global_state(self) -> None:
        for group, part in zip(self.param_groups, self._own.parts):
            group[self.GROUP_KEY] = part
            self._shared = True

    def state_dict(self) -> dict[str, Any]:
        """The base optimizers' state and param groups, with the wrapper's tensors in them.

        A base optimizer that has a state dict of its own makes it; further entries are kept.
        """
        if len(self.optimizers) > 1 or not has_own_state_dict(self.optimizers[0]):
            return super().state_dict()
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict: dict[str, Any] = dict(self.optimizers[0].state_dict())
        states, groups = dict(state_dict["state"]), [dict(group) for group in state_dict["param_groups"]]
        held = dict(self.state)
        for group, live, part in zip(groups, self.param_groups, self._own.parts):
            group[self.GROUP_KEY] = part
            for key, parameter in zip(group["params"], live["params"]):
                # The base may keep its state elsewhere, and know nothing of ours.
                mine = held.get(parameter, {})
                own = {name: mine[name] for name in self.STATE_KEYS if name in mine}
                if own:
                    states[key] = {**states.get(key, {}), **own}
        state_dict.update(state=states, param_groups=groups)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this wrapper, or of the base optimizer alone.

        The wrapper's tensors keep the dtype they were saved with. A state dict of the base optimizer alone resets the
        wrapper's own state. As with torch's optimizers, tensors that need no conversion are not copied: copy the state
        dict first if it is loaded again.

        Args:
            state_dict: State dict of an optimizer with the same numbers of groups and parameters.

        Raises:
            ValueError: if groups, shapes or the wrapper's settings do not fit; nothing has changed then, except after
                an error of a base optimizer's own checks.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced

        states = state_dict["state"]
        groups = [dict(group) for group in state_dict["param_groups"]]
        if len(groups) != len(self.param_groups):
            raise ValueError(
                f"the state dict has {len(groups)} parameter groups, the optimizer {len(self.param_groups)}"
            )
        for group, live in zip(groups, self.param_groups):
            for key in self.LIVE_KEYS:
                group.pop(key, None)
                group.update({key: live[key]} if key in live else {})
        saved = [group.pop(self.GROUP_KEY, None) for group in groups]
        own = self._own_state_to_load(states, groups)
        self.check_param_groups(state_dict["param_groups"])

        known = {key for group in groups for key in group["params"]}
        rest = {key: value for key, value in states.items() if key not in known}
        extra = extra_entries(state_dict) if len(self.optimizers) == 1 else {}
        start = 0
        for optimizer in self.optimizers:
            mine = groups[start : start + len(optimizer.param_groups)]
            start += len(mine)
            state: dict[Any, Any] = {
                key: {name: value for name, value in states[key].items() if name not in self.STATE_KEYS}
                if isinstance(states[key], dict)
                else states[key]
                for group in mine
                for key in group["params"]
                if key in states
            }
            optimizer.load_state_dict({**extra, "state": {**state, **rest}, "param_groups": mine})
            rest = {}
        for state in self.state.values():  # the base may have loaded its state elsewhere
            for name in self.STATE_KEYS if isinstance(state, dict) else ():
                state.pop(name, None)
        for parameter, tensors in own.items():
            self.state[parameter].update(tensors)

        self._own.load(saved)
        self._put_global_state()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _own_state_to_load(self, states: Any, groups: list[dict[str, Any]]) -> dict[Tensor, dict[str, Tensor]]:
        """The wrapper's tensors in ``states``, by parameter; raise ValueError if a shape does not fit."""
        own: dict[Tensor, dict[str, Tensor]] = {}
        for group, live in zip(groups, self.param_groups):
            if len(group["params"]) != len(live["params"]):
                raise ValueError(
                    f"a parameter group of the state dict has {len(group['params'])} parameters, "
                    f"the optimizer's {len(live['params'])}"
                )
            for key, parameter in zip(group["params"], live["params"]):
                state = states.get(key)
                for name in self.STATE_KEYS:
                    value = state.get(name) if isinstance(state, dict) else None
                    if value is None:
                        continue
                    if value.shape != parameter.shape and not is_of_sample(parameter, value.shape):
                        raise ValueError(
                            f"{name} of parameter {key} has shape {tuple(value.shape)} in the state dict, the "
                            f"parameter {tuple(parameter.shape)}: saved from another model, or from other shards (use "
                            "torch.distributed.checkpoint to change the layout)"
                        )
                    own.setdefault(parameter, {})[name] = value.to(parameter.device)
        return own

    def __repr__(self) -> str:
        lines = [f"{self._title()} ("]
        for index, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {index}")
            lines += [f"    {key}: {group[key]}" for key in sorted(group) if key not in ("params", self.GROUP_KEY)]
        return "\n".join(lines) + "\n)"

    def _title(self) -> str:
        """The class, what it wraps, and its settings, in words."""
        bases = ", ".join(type(optimizer).__name__ for optimizer in self.optimizers)
        return f"{type(self).__name__}({bases}, {self._settings()})"

    def _settings(self) -> str:
        """The wrapper's own settings, in words."""
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        shared = {name: state[name] for name in ("param_groups", "state", "defaults") if name in state}
        super().__setstate__({name: value for name, value in state.items() if name not in shared})
        for name, value in shared.items():
            setattr(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        # As in torch's optimizers: hooks, and a scheduler's wrapper of step, belong to this object and are not copied.
        return {
            key: value
            for key, value in self.__dict__.items()
            if not key.startswith(("_optimizer_", "_zero_grad_profile_name")) and key != "step"
        }
