"""The methods of ``benchmark.py tuning``: the sweep, the tuners, and published peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from benchmarks.digest import code_digest, package_version
from benchmarks.training import Task
from manic import Mechanic
from manic.tuners.registry import TUNERS

SWEEP = "sweep"
"""The reference: the base optimizer at the best of a grid of learning rates."""
TUNER = "multiplicative"
"""The method that also runs at each of :data:`BASE_LRS`."""
FIXED = "fixed lr"
"""One learning rate for each family of optimizers (:mod:`benchmarks.fixed_lr`); its runs are runs of the sweep."""
BASE_LRS = (1e-6, 1e-3, 1.0, 1e2)

Builder = Callable[[Task, nn.Module, float], list[Any]]


@dataclass(frozen=True)
class Method:
    """A method that needs no sweep, or the sweep itself."""

    build: Builder
    bases: tuple[str, ...] | None = None
    """The base optimizers that it supports; ``None``: all."""
    lrs: dict[str, float] | None = None
    """Its documented learning rate by base optimizer, if it is not 1."""
    keeps_schedule: bool = True
    modules: tuple[str, ...] = ()
    """The code that it consists of, beside the base optimizer."""
    package: str | None = None
    """The distribution that it comes from."""

    @property
    def digest(self) -> str:
        """What stands for the method's code."""
        code = code_digest(*self.modules) if self.modules else ""
        return code + (package_version(self.package) if self.package else "")

    def supports(self, task: Task) -> bool:
        """Whether it has a counterpart of the task's base optimizer."""
        return self.bases is None or task.base in self.bases

    def lr(self, task: Task) -> float:
        """Its learning rate on a task; the sweep's are those of a grid instead."""
        return (self.lrs or {}).get(task.base, 1.0)


def _mechanic(variant: str) -> Builder:
    return lambda task, model, lr: [Mechanic(task.bases(model, lr), variant=variant)]


class _RebasingMechanic(Mechanic):
    """Mechanic that calls ``rebase()`` each time S has doubled."""

    _last = 0.0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        scale = float(self.scale)
        if scale >= 2.0 * self._last:
            if self._last > 0.0:
                self.rebase()
            self._last = scale
        return loss


def _groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [
        {"params": group["params"], "weight_decay": group.get("weight_decay", 0.0)} for group in optimizer.param_groups
    ]


def _mechanic_pytorch(task: Task, model: nn.Module, lr: float) -> list[Any]:
    from mechanic_pytorch import mechanize

    (base,) = task.bases(model, lr)
    settings = {name: base.defaults[name] for name in ("betas", "momentum") if name in base.defaults}
    return [mechanize(type(base))(_groups(base), lr=lr, **settings)]


def _prodigy(task: Task, model: nn.Module, lr: float) -> list[Any]:
    from prodigyopt import Prodigy

    (base,) = task.bases(model, lr)
    return [Prodigy(_groups(base), lr=lr, decouple=task.base == "adamw", safeguard_warmup=True)]


def _d_adaptation(task: Task, model: nn.Module, lr: float) -> list[Any]:
    import dadaptation

    (base,) = task.bases(model, lr)
    if task.base in ("adamw", "adam"):
        return [dadaptation.DAdaptAdam(_groups(base), lr=lr, decouple=task.base == "adamw")]
    if task.base == "lion":
        return [dadaptation.DAdaptLion(_groups(base), lr=lr)]
    return [dadaptation.DAdaptSGD(_groups(base), lr=lr, momentum=base.defaults["momentum"])]


def _schedule_free(task: Task, model: nn.Module, lr: float) -> list[Any]:
    import schedulefree

    (base,) = task.bases(model, lr)
    is_adam = task.base in ("adamw", "adam")
    cls = schedulefree.AdamWScheduleFree if is_adam else schedulefree.SGDScheduleFree
    optimizer = cls(_groups(base), lr=lr, warmup_steps=round(task.warm_up * task.steps))
    optimizer.train()
    return [optimizer]


_BETTING = ("manic.tuners.mechanic",)
_ADAMS = {"adamw": 0.0025, "adam": 0.0025}
_SGDS = {"sgd": 1.0, "momentum": 1.0}
METHODS: dict[str, Method] = {
    SWEEP: Method(lambda task, model, lr: task.bases(model, lr)),
    TUNER: Method(_mechanic(TUNER), modules=("manic.tuners.multiplicative",)),
    "optax": Method(_mechanic("optax"), modules=_BETTING),
    "optax, resets": Method(
        lambda task, model, lr: [_RebasingMechanic(task.bases(model, lr), variant="optax")], modules=_BETTING
    ),
    "pytorch": Method(_mechanic("pytorch"), modules=_BETTING),
    "mechanic-pytorch": Method(_mechanic_pytorch, ("adamw", "sgd", "lion"), package="mechanic-pytorch"),
    "Prodigy": Method(_prodigy, tuple(_ADAMS), package="prodigyopt"),
    "D-Adaptation": Method(_d_adaptation, (*_ADAMS, *_SGDS, "lion"), package="dadaptation"),
    "Schedule-Free": Method(
        _schedule_free, (*_ADAMS, *_SGDS), {**_ADAMS, **_SGDS}, keeps_schedule=False, package="schedulefree"
    ),
}
for _name, _tuner in TUNERS.items():
    METHODS.setdefault(_name, Method(_mechanic(_name), modules=(_tuner.__module__,)))
# By set of tasks: what runs there if no methods are named.
NAMED_METHODS = (*METHODS, FIXED)
GENERATED_METHODS = (SWEEP, FIXED, TUNER, "optax", "pytorch", "Prodigy", "D-Adaptation", "Schedule-Free")
LADDER_METHODS = (SWEEP, FIXED, TUNER)
