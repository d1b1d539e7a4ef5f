"""Base optimizers that would move a displaced parameter back are refused, and nothing of them is changed by asking."""

from __future__ import annotations

import copy
import random
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from manic import Mechanic
from manic.optimizer.positions import FIRST_STEPS
from manic.testing import ranks
from manic.tuners.multiplicative_reference import MultiplicativeReference
from support.positions import Base
from support.problems import problem


class FollowsTheLeader(Base):
    """As FTRL: the position is computed from sums of gradients and of earlier positions."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        z, n = (state.setdefault(name, torch.zeros_like(p)) for name in "zn")
        sigma = ((n + g * g).sqrt() - n.sqrt()) / lr
        z.add_(g - sigma * p)
        n.add_(g * g)
        p.copy_(-lr * z / n.sqrt())


class OnASphere(Base):
    """Rows keep their length."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        length = state.setdefault("length", p.norm(dim=-1, keepdim=True))
        p.add_(g, alpha=-lr)
        p.mul_(length / p.norm(dim=-1, keepdim=True))


class OnASphereAfterTenSteps(OnASphere):
    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        if self.steps > 10:
            super().update(p, g, state, lr)
        else:
            p.add_(g, alpha=-lr)


class DecaysFast(Base):
    """Weight decay, both in proportion to the learning rate and not."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        p.mul_(1.0 - 0.1 - 0.5 * lr).add_(g, alpha=-lr)


class Noisy(Base):
    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        p.add_(g + torch.randn_like(g), alpha=-lr)


class Counts(Base):
    """Its attributes, settings and state change in every step."""

    def begin(self) -> None:
        self.seen: list[Tensor] = []
        for group in self.param_groups:
            group["count"] = torch.zeros(())

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        self.seen.append(g.clone())
        self.param_groups[0]["count"] += 1
        state.setdefault("sum", torch.zeros_like(p)).add_(g)
        p.add_(g, alpha=-lr)


class StepsAnother(Base):
    """An optimizer over all parameters does its work."""

    def begin(self) -> None:
        self.inner = torch.optim.SGD([p for group in self.param_groups for p in group["params"]], lr=0.1)

    def step(self, closure: Any = None) -> None:
        self.inner.step()


class ThroughAFunction(Base):
    """Its step runs through an attribute that is not copied with it, and takes the original along."""

    def begin(self) -> None:
        self.calls = 0
        self.call = self.reaches_itself()

    def reaches_itself(self) -> Callable[[], None]:
        return lambda: self.do_step()

    def do_step(self) -> None:
        self.calls += 1
        super().step()

    def step(self, closure: Any = None) -> None:
        self.call()

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        p.add_(g, alpha=-lr)


class ThroughAWrapper(ThroughAFunction):
    def reaches_itself(self) -> Callable[[], None]:
        return torch.compiler.disable(self.do_step)  # a wrapper, like that of torch.compile


class ThroughAMethod(ThroughAFunction):
    def reaches_itself(self) -> Callable[[], None]:
        return self.do_step


class ThroughAPartial(ThroughAFunction):
    def reaches_itself(self) -> Callable[[], None]:
        return partial([lambda own: own.do_step()][0], self)


class ThroughADefault(ThroughAFunction):
    def reaches_itself(self) -> Callable[[], None]:
        return lambda own=self: own.do_step()  # type: ignore[misc]


class ThroughAReference(ThroughAFunction):
    def begin(self) -> None:
        super().begin()
        self.reference = weakref.ref(self)

    def step(self, closure: Any = None) -> None:
        own = self.reference()
        assert own is not None
        own.do_step()


class OwnsAHandle(Base):
    """As one that frees memory of its own."""

    are_open: dict[int, bool] = {}

    def begin(self) -> None:
        self.handle = id(self)
        self.are_open[self.handle] = True

    def __del__(self) -> None:
        self.are_open.pop(self.handle, None)

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        assert self.are_open[self.handle]
        p.add_(g, alpha=-lr)


class Raises(Mapping[str, int]):
    """As a setting that has no value."""

    def __getitem__(self, key: str) -> int:
        raise LookupError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(["missing"])

    def __len__(self) -> int:
        return 1


class HoldsWhatRaises(Base):
    def begin(self) -> None:
        gone = nn.Linear(1, 1)
        self.held = [Raises(), weakref.proxy(gone), sys]

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        p.add_(g, alpha=-lr)


class OwnLearningRate(Base):
    """Its weight decay is in proportion to a learning rate that is in no param group."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        p.mul_(1.0 - 0.3).add_(g.sign(), alpha=-1e-3)


class RandomNumbers(Base):
    """From every generator there is."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        drawn = random.random() + float(torch.rand(()))
        drawn += float(sys.modules["numpy"].random.rand()) if "numpy" in sys.modules else 0.0
        p.add_(g, alpha=-lr * drawn)


class Plain(MultiplicativeReference):
    """The reference, as :func:`train` takes it."""

    def zero_grad(self) -> None:
        self.base.zero_grad()


def train(optimizer: Optimizer | Plain, loss: Callable[[int], Tensor], steps: int = FIRST_STEPS + 2) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        torch.manual_seed(step)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"variant": "optax"}, {"nonfinite": "ignore"}, {"update": "decoupled"}], ids=str
)
@pytest.mark.parametrize("base", [FollowsTheLeader, OnASphere, OnASphereAfterTenSteps])
def test_refused(base: type[Base], options: dict[str, Any], dtype: torch.dtype) -> None:
    parameters, loss = problem(dtype)
    optimizer = Mechanic(base(parameters, lr=1.0), **options)
    with pytest.raises(TypeError, match=rf"cannot scale {base.__name__}: its next step would move parameter \d"):
        train(optimizer, loss)


@pytest.mark.parametrize(
    "base",
    [
        DecaysFast, Noisy, Counts, StepsAnother, RandomNumbers, OwnLearningRate, OwnsAHandle, HoldsWhatRaises,
        ThroughAFunction, ThroughAWrapper, ThroughAMethod, ThroughAPartial, ThroughADefault, ThroughAReference,
    ],
)  # fmt: skip
def test_accepted_and_not_changed_by_asking(base: type[Base]) -> None:
    """The reference in plain loops asks no copy."""
    ends = []
    for asks in (True, False):
        parameters, loss = problem()
        optimizer = base(parameters, lr=0.5)
        random.seed(0)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(0)
        train(Mechanic(optimizer) if asks else Plain(parameters, optimizer), loss)
        ends.append([*parameters, *getattr(optimizer, "seen", [])])
    assert len(ends[0]) == len(ends[1])
    for one, two in zip(*ends):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


class Registered(Base):
    """Its step works on what a class holds, where no copy looks."""

    registered: list[Optimizer] = []

    def begin(self) -> None:
        self.registered[:] = [self]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.registered[0].param_groups:
            for p in group["params"]:
                self.write(p, group["lr"])

    def write(self, p: Tensor, lr: float) -> None:
        p.sub_(lr * p.grad)


class RegisteredByData(Registered):
    def write(self, p: Tensor, lr: float) -> None:
        p.data.sub_(lr * p.grad)


@pytest.mark.parametrize("base", [Registered, RegisteredByData])
def test_a_copy_that_steps_the_optimizer_itself_is_an_error_in_words(base: type[Base]) -> None:
    parameters, loss = problem()
    with pytest.raises(TypeError, match=rf"{base.__name__}: the step of a copy of it has changed its own parameters"):
        train(Mechanic(base(parameters, lr=0.5)), loss)


class HoldsMuch(Base):
    """More than is copied, though no tensor of floating point says so."""

    def begin(self) -> None:
        self.codes = torch.zeros(1 << 27, dtype=torch.uint8)[:1]

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        assert self.codes.untyped_storage().nbytes() == 1 << 27
        p.add_(g, alpha=-lr)


class HoldsMuchInState(HoldsMuch):
    def begin(self) -> None:
        super().begin()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["codes"] = self.codes
        del self.codes

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        p.add_(g, alpha=-lr)


@pytest.mark.parametrize("base", [HoldsMuch, HoldsMuchInState])
def test_much_memory_is_not_copied(base: type[Base], monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    real = torch.UntypedStorage.__deepcopy__
    monkeypatch.setattr(
        torch.UntypedStorage,
        "__deepcopy__",
        lambda self, memo: copied.append(self.nbytes()) or real(self, memo),
    )
    parameters, loss = problem()
    train(Mechanic(base(parameters, lr=0.5)), loss)
    assert max(copied, default=0) < 1 << 26


def test_nothing_has_changed_after_the_error() -> None:
    parameters, loss = problem()
    optimizer = Mechanic(FollowsTheLeader(parameters, lr=1.0))
    train(optimizer, loss, 1)
    before, scale = copy.deepcopy(parameters), optimizer.scale
    with pytest.raises(TypeError, match="Use an optimizer that adds its update"):
        train(optimizer, loss, 1)
    assert all(torch.equal(p, q) for p, q in zip(parameters, before))
    assert optimizer.scale == scale


class Communicates(Base):
    """A step of one rank alone would hang."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], lr: float) -> None:
        total = g.square().sum()
        dist.all_reduce(total)
        p.add_(g / total.sqrt(), alpha=-lr)


@ranks(2)
def test_a_base_that_communicates_takes_no_further_step() -> None:
    rank = dist.get_rank()
    x = nn.Parameter(torch.ones(4, 4) if rank else torch.randn(4, 4))  # ones are not asked for, so rank 1 does not step
    optimizer = Mechanic(Communicates([x], lr=1.0), plain="sharded")
    train(optimizer, lambda step: (x * torch.linspace(-1, 2, 16).view(4, 4)).sum())
    assert optimizer.scale > 0


@ranks(2)
def test_refused_on_all_ranks_under_fsdp2() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    fully_shard(model)
    optimizer = Mechanic(FollowsTheLeader(model.parameters(), lr=1.0))
    x = torch.randn(8, 6, dtype=torch.float64)
    with pytest.raises(TypeError, match="rank 0: Mechanic cannot scale FollowsTheLeader"):
        train(optimizer, lambda step: model(x).square().mean())
