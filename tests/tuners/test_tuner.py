"""The tuners alone: proposals from a state and sums."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from manic import Mechanic
from manic.tuners.base import Tuner
from manic.tuners.mechanic_reference import BETAS, MechanicReference
from manic.tuners.multiplicative import Multiplicative
from manic.tuners.multiplicative_reference import MultiplicativeReference
from manic.tuners.registry import TUNERS, make_tuner
from manic.tuners.state import TunerState
from support.problems import problem

PUBLISHED = ["optax", "pytorch"]
OPTIONS: dict[str, dict[str, Any]] = {"multiplicative": {}, "optax": {"betas": BETAS}, "pytorch": {"betas": BETAS}}


class Driven:
    """A tuner whose proposals are committed."""

    def __init__(self, tuner: Tuner) -> None:
        self.tuner, self.state = tuner, TunerState(tuner)

    def learn(self, **sums: float) -> Tensor:
        """Take a step; sums not given are 1, or 0 for <Delta, x>, including late sums."""
        names = (*self.tuner.sums, *(name for name in self.tuner.late_sums if name in sums or name == "delta_x"))
        if "x_square" in self.tuner.late_sums:
            names = (*names, "x_square")
        values = {"delta_x": 0.0, **sums}
        self.last = self.tuner.propose(
            self.state.tensor,
            {name: torch.tensor(values.get(name, 1.0), dtype=torch.float64) for name in names},
        )
        self.state.commit(self.last)
        return self.last.scale


def driven(variant: str, **options: Any) -> Driven:
    return Driven(make_tuner(variant, **{**OPTIONS.get(variant, {}), **options}))


@pytest.mark.parametrize("variant", PUBLISHED)
@given(hs=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), s_init=st.floats(1e-10, 1e2))
def test_equals_the_reference_on_any_rewards(variant: str, hs: list[float], s_init: float) -> None:
    tuner = driven(variant, s_init=s_init)
    reference = MechanicReference([], None, variant, s_init)  # type: ignore[arg-type]
    for h in hs:
        scale = tuner.learn(delta_grad=h)
        reference.learn(h)
        assert scale.item() == pytest.approx(reference.scale, rel=1e-9, abs=1e-300)
    assert tuner.state.updates.item() == len(hs)


LENGTHS = st.just(0.0) | st.floats(1e-9, 1e6)
COSINES = st.just(0.0) | st.floats(1e-150, 2.0) | st.floats(-2.0, -1e-150)  # whose squares are normal numbers


@given(
    steps=st.lists(
        st.tuples(
            COSINES, COSINES, LENGTHS, LENGTHS, LENGTHS, LENGTHS, st.floats(0.0, 1.0)
        ),
        min_size=1,
        max_size=40,
    ),
    beta=st.floats(0.5, 0.9999),
)  # fmt: skip
def test_multiplicative_equals_its_reference(steps: list[tuple[float, ...]], beta: float) -> None:
    tuner = driven("multiplicative", betas=(beta,))
    reference = MultiplicativeReference([], None, 3e-4, beta)  # type: ignore[arg-type]
    # The first step has no displacement and a learning rate of 0, so it only sets the scale.
    reference.scale = tuner.learn(update_square=4.0, x_square=9.0, delta_square=0.0, lr=0.0).item()
    reference.learn(1.0, 1.0, 0.0, 1.0, 3.0, 0.0)
    assert reference.scale == pytest.approx(3e-4 * 3.0 / 2.0)
    for cosine, cosine_1, far, near, gradient, length, lr in steps:
        delta_grad, delta_grad_1 = cosine * far * gradient, cosine_1 * near * gradient
        scale = tuner.learn(
            delta_grad=delta_grad, delta_square=far**2, delta_grad_1=delta_grad_1, delta_square_1=near**2,
            grad_square=gradient**2, x_square=length**2, lr=lr,
        )  # fmt: skip
        reference.learn(delta_grad - 0.7 * delta_grad_1, gradient**2, far, near, length, lr)
        assert scale.item() == pytest.approx(reference.scale, rel=1e-9)


def test_the_scale_falls_by_as_much_as_the_learning_rate_rises_above_its_largest() -> None:
    tuner = driven("multiplicative")
    first = tuner.learn(update_square=4.0, delta_square=0.0, lr=0.1).item()
    for lr, largest in ((0.05, 0.1), (0.1, 0.1), (0.3, 0.3), (0.0, 0.3), (0.3, 0.3), (0.31, 0.31), (9.0, 9.0)):
        assert tuner.learn(delta_square=0.0, lr=lr).item() == pytest.approx(first * 0.1 / largest)


@pytest.mark.parametrize("x_square", [0.0, 4.0])
def test_the_first_step_has_length_s_init(x_square: float) -> None:
    tuner = driven("multiplicative", s_init=1e-3)
    assert tuner.learn(update_square=0.0, x_square=x_square, delta_square=0.0) == 0.0
    assert tuner.state.has_left_start == [False]
    for size in (1e-8, 1.0, 1e8):
        tuner = driven("multiplicative", s_init=1e-3)
        scale = tuner.learn(update_square=size**2, x_square=x_square, delta_square=0.0)
        assert (scale * size).item() == pytest.approx(1e-3 * (x_square**0.5 or 1.0))
        assert tuner.state.has_left_start == [True]
    bounded = driven("multiplicative", s_init=1e-3, s_max=1e-9)
    assert bounded.learn(update_square=5.0, x_square=5.0, delta_square=0.0) == 1e-9


@given(
    steps=st.lists(st.tuples(COSINES, st.floats(1e-6, 1e6), st.floats(0.01, 1.0)), min_size=1, max_size=40),
    s_max=st.floats(1e-9, 1e3),
)
def test_the_scale_is_never_above_s_max(steps: list[tuple[float, ...]], s_max: float) -> None:
    tuner = driven("multiplicative", s_max=s_max)
    assert tuner.learn(update_square=1.0, x_square=1e6, delta_square=0.0) <= s_max
    for cosine, far, lr in steps:
        assert tuner.learn(delta_grad=-cosine * far, delta_square=far**2, delta_grad_1=0.0, lr=lr) <= s_max


@pytest.mark.parametrize("variant", PUBLISHED)
def test_the_lambda_term_uses_global_norms(variant: str) -> None:
    tuner = driven(variant, s_init=0.5, s_decay=0.1)
    s = tuner.learn(delta_grad=-1.0).item()
    tuner.learn(delta_grad=2.0, grad_square=9.0, delta_x=5.0, x_square=4.0)
    assert tuner.last.signal.item() == pytest.approx(2.0 + 0.1 * s * 3.0 / (2.0 + 1e-8) * 5.0)


@pytest.mark.parametrize("variant", PUBLISHED)
def test_moving_against_the_gradient_grows_the_scale(variant: str) -> None:
    tuner = driven(variant)
    scales = [tuner.learn(delta_grad=-1.0).item() for _ in range(50)]
    assert scales[-1] > 1e3 * scales[2]


@pytest.mark.parametrize("variant", TUNERS)
def test_a_proposal_changes_nothing_until_it_is_committed(variant: str) -> None:
    tuner = driven(variant)
    tuner.learn(delta_grad=-1.0, update_square=4.0)
    tensor, before = tuner.state.tensor, tuner.state.tensor.clone()
    sums = dict(tuner.last.sums)
    proposals = [tuner.tuner.propose(tensor, sums) for _ in range(2)]
    assert torch.equal(proposals[0].state, proposals[1].state)
    assert torch.equal(tensor, before)
    tuner.state.commit(proposals[0])
    assert tuner.state.tensor is tensor
    assert torch.equal(tensor, proposals[0].state)
    assert not torch.equal(tensor, before)
    assert tensor.dtype == torch.float64
    assert tensor.shape == (4 + len(tuner.tuner.fields), tuner.tuner.columns)


@pytest.mark.parametrize("variant", TUNERS)
def test_all_zero_sums_are_harmless(variant: str) -> None:
    tuner = driven(variant)
    for _ in range(5):
        names = ("delta_grad", "grad_square", "delta_square", "x_square", "lr", "update_square")
        assert math.isfinite(tuner.learn(**dict.fromkeys(names, 0.0)).item())


class TestSavedStates:
    def test_refuses_another_number_of_betas(self) -> None:
        with pytest.raises(ValueError, match="other betas"):
            driven("optax", betas=(0.9, 0.99)).state.load(driven("optax").state.tensor)

    def test_refuses_another_variant(self) -> None:
        with pytest.raises(ValueError, match="of variant optax, this one pytorch; pass the same"):
            driven("pytorch").state.load(driven("optax").state.tensor)

    def test_refuses_another_version(self) -> None:
        for saved in (torch.rand(13, 1), torch.rand(8, 6), torch.rand(3)):
            with pytest.raises(ValueError, match="does not have schema 1"):
                driven("multiplicative").state.load(saved)


class TestOptions:
    """Options that the variant does not have are refused."""

    @pytest.mark.parametrize(("variant", "options", "message"), [
        ("multiplicative", {"s_decay": 0.01}, r"does not have the option\(s\) s_decay; it has"),
        ("multiplicative", {"eps": 1e-8, "s_decay": 0.0}, r"does not have the option\(s\) eps, s_decay"),
        ("multiplicative", {"betas": (0.9, 0.99)}, "has one beta"),
        ("adagrad", {}, "variant must be one of"),
        ("optax", {"betas": ()}, "betas must be one or more numbers strictly between 0 and 1"),
    ])  # fmt: skip
    def test_refuses_options_of_other_variants(self, variant: str, options: dict[str, Any], message: str) -> None:
        parameters, _ = problem()
        base = torch.optim.SGD(parameters, lr=1.0)
        with pytest.raises(ValueError, match=message):
            Mechanic(base, variant=variant, **options)
        if variant == "multiplicative":  # it is the default
            with pytest.raises(ValueError, match=message):
                Mechanic(base, **options)

    def test_refuses_options_beside_a_tuner(self) -> None:
        parameters, _ = problem()
        base = torch.optim.SGD(parameters, lr=1.0)
        with pytest.raises(
            ValueError, match=r"variant is a tuner, which has its options already; leave out \['s_init'\]"
        ):
            Mechanic(base, variant=make_tuner("optax"), s_init=1.0)
        assert "s_init=0.5" in repr(Mechanic(base, variant=make_tuner("optax", s_init=0.5)))


class TestDeclarations:
    """What does not fit together is refused before a run, and the order of sums does not matter."""

    @pytest.mark.parametrize(("changes", "message"), [
        ({"sums": ("grad_square", "loss")}, "sums must be among"),
        ({"sums": ("delta_square",)}, "sums must have grad_square"),
        ({"late_sums": ("delta_grad",)}, "late_sums must be among"),
        ({"scales": "update"}, "scales is 'update'"),
        ({"scales": "displacement"}, "update_square needs scales='updates'; per_group needs"),
        ({"fields": ("r", "updates")}, "fields are"),
        ({"fixed": ("weight",)}, "fixed fields need an initial value"),
    ])  # fmt: skip
    def test_are_refused(self, changes: dict[str, Any], message: str) -> None:
        tuner = type("Other", (Multiplicative,), {"name": "other", **changes})()
        with pytest.raises(ValueError, match=message):
            Mechanic(torch.optim.SGD(problem()[0], lr=1.0), variant=tuner)

    def test_sums_come_in_any_order(self) -> None:
        scales = []
        for sums in (Multiplicative.sums, Multiplicative.sums[::-1]):
            parameters, loss = problem()
            tuner = type("Other", (Multiplicative,), {"name": "other", "sums": sums})()
            optimizer = Mechanic(torch.optim.SGD(parameters, lr=0.5), variant=tuner)
            for step in range(10):
                optimizer.zero_grad()
                loss(step).backward()
                optimizer.step()
            scales.append(optimizer.scale.item())
        assert scales[0] == scales[1] > 0

    def test_fields_in_another_order_are_another_state(self) -> None:
        other = type("Other", (Multiplicative,), {"fields": Multiplicative.fields[::-1]})
        with pytest.raises(ValueError, match="of variant multiplicative, this one multiplicative"):
            TunerState(other()).load(TunerState(Multiplicative()).tensor)
