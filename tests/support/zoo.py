"""Sorts optimizers of any package by what they do under Mechanic, and writes the table of the docs.

    python tests/support/zoo.py  # runs all packages that are installed, and writes the tables anew

An optimizer is sorted by experiment alone, on a network of 448 parameters: nothing is known of it but how to make it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import io
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from manic import Mechanic
from manic.testing import run

STEPS = 18
"""More than those in which Mechanic looks for positions."""
DOCS = Path(__file__).parents[2] / "docs"

IS_LR = "right: S * lr is the learning rate"
BY_DEFINITION = "right: x moves by S * u, which is not in proportion to the learning rate"
REFUSED = "refused by Mechanic"
UNSUPPORTED = "fails without Mechanic, too"
WRONG = "WRONG"
OUTCOMES = (IS_LR, BY_DEFINITION, REFUSED, UNSUPPORTED, WRONG)

Make = Callable[[nn.Module, "float | None"], Optimizer]
"""Makes an optimizer of a model's parameters with a learning rate, or with the package's own."""


class Case(NamedTuple):
    """How to make an optimizer, and what its backward pass has to keep."""

    name: str
    make: Make
    keeps_graph: bool = False
    """Its step differentiates the gradients."""
    width: int = 16
    """Of the network; some packages do something else with large tensors."""
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)
    """The first that works without Mechanic is taken."""


class Verdict(NamedTuple):
    """Where an optimizer belongs, and why."""

    outcome: str
    reason: str = ""


class _Problem:
    """A network and its gradients at each step."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        width = case.width
        self.model = nn.Sequential(
            nn.Linear(8, width, bias=False), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4)
        ).to(dtype)
        self._case, self._dtype = case, dtype

    @property
    def x(self) -> Tensor:
        """All parameters, one after the other, in float64."""
        return torch.cat([p.detach().double().flatten() for p in self.model.parameters()])

    @x.setter
    def x(self, values: Tensor) -> None:
        parts = values.split([p.numel() for p in self.model.parameters()])
        for p, part in zip(self.model.parameters(), parts):
            p.data.copy_(part.view_as(p))

    def backward(self, step: int) -> Tensor:
        """Make the gradients of a step, and return the loss."""
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step)).to(self._dtype)
        y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x.sum(1), x[:, 3]], 1)
        for p in self.model.parameters():
            p.grad = None
        loss = (self.model(x) - y).square().mean()
        loss.backward(create_graph=self._case.keeps_graph)
        return loss.detach()

    def step(self, optimizer: Optimizer, step: int) -> None:
        """Make gradients, and let the optimizer step; an optimizer of random numbers gets the same each time."""
        self.backward(step)
        torch.manual_seed(step)
        optimizer.step()


def sort(case: Case) -> Verdict:
    """Find where an optimizer belongs."""
    warnings.simplefilter("ignore")
    with torch.compiler.set_stance("force_eager"):
        errors = [_error_without_mechanic(case, dtype) for dtype in case.dtypes]
        if None not in errors:
            return _without_a_closure(case, errors[0] or "")
        dtype = case.dtypes[errors.index(None)]
        try:
            return _sort(case, dtype)
        except Exception as error:
            words = _words(error)
            return Verdict(REFUSED if "Mechanic" in words else WRONG, _short(words))


def _sort(case: Case, dtype: torch.dtype) -> Verdict:
    near = 1e-5 if dtype == torch.float64 else 2e-3
    error, path, scales = _distance_from_definition(case, dtype, {})
    optax, _, _ = _distance_from_definition(case, dtype, {"variant": "optax", "s_init": 1e-3})
    if max(error, optax) > near:
        return Verdict(WRONG, f"x is not x + S * u, by {max(error, optax):.1e} of the step")
    if scales[-1] <= 0.0:
        return Verdict(WRONG, "S stays at 0")
    if not case.keeps_graph and (kept := _share_kept(case, dtype)) < 0.8:
        return Verdict(WRONG, f"it moves a displaced parameter back: {kept:.0%} is left")
    if _resumes(case, dtype, is_wrapped=False) and not _resumes(case, dtype, is_wrapped=True):
        return Verdict(WRONG, "it does not resume, but without Mechanic it does")
    if _distance_from_learning_rate(case, dtype, path, scales) < 1e-3:
        return Verdict(IS_LR)
    return Verdict(BY_DEFINITION)


def _error_without_mechanic(case: Case, dtype: torch.dtype) -> str | None:
    problem = _Problem(case, dtype)
    try:
        optimizer = case.make(problem.model, None)
        for step in range(4):
            problem.step(optimizer, step)
    except Exception as error:
        return _words(error)
    return None if bool(problem.x.isfinite().all()) else "parameters are not finite"


def _without_a_closure(case: Case, error: str) -> Verdict:
    """Sort an optimizer whose step fails without a closure: some need one, others fail in any case."""
    dtype = case.dtypes[-1]
    problem = _Problem(case, dtype)
    try:
        optimizer = case.make(problem.model, None)
        for step in range(4):
            problem.backward(step)
            optimizer.step(functools.partial(torch.enable_grad()(problem.backward), step))  # type: ignore[arg-type]
    except Exception:
        return Verdict(UNSUPPORTED, _short(error))
    problem = _Problem(case, dtype)
    before = problem.x
    try:
        optimizer = Mechanic(case.make(problem.model, None))
        problem.backward(0)
        optimizer.step(functools.partial(problem.backward, 0))
    except Exception as refusal:
        is_said = re.search("Mechanic (calls the closure once|cannot wrap)", _words(refusal)) is not None
        is_right = is_said and torch.equal(problem.x, before)
        return Verdict(REFUSED, "its step needs a closure") if is_right else Verdict(WRONG, _words(refusal))
    return Verdict(WRONG, "it needs a closure, and runs without")


def _distance_from_definition(
    case: Case, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[float, list[Tensor], list[float]]:
    """The largest error of x_{t+1}, relative to the step, with every x_t and S_t.

    The update u_t is that of the optimizer without Mechanic, which is set to x_t before each step.
    """
    mine, bare = _Problem(case, dtype), _Problem(case, dtype)
    optimizer, alone = Mechanic(case.make(mine.model, 1.0), **options), case.make(bare.model, 1.0)
    path, scales, largest = [mine.x], [], 0.0
    delta = torch.zeros_like(mine.x)
    for step in range(STEPS):
        mine.step(optimizer, step)
        bare.x = path[-1]
        if step == 0:
            path[0] = bare.x
        bare.step(alone, step)
        update, scale = bare.x - path[-1], float(optimizer.scale)
        delta += update
        expected = path[0] + scale * delta if options else path[-1] + scale * update
        size = (expected - path[-1]).norm()
        if size > 0:
            largest = max(largest, float((mine.x - expected).norm() / size))
        path.append(mine.x)
        scales.append(scale)
    return largest, path, scales


def _distance_from_learning_rate(case: Case, dtype: torch.dtype, path: list[Tensor], scales: list[float]) -> float:
    """How far the run is from one without Mechanic that has S_{t+1} as its learning rate, relative to its length."""
    bare = _Problem(case, dtype)
    optimizer = case.make(bare.model, 1.0)
    lrs = [group.get("lr") for group in optimizer.param_groups]
    if None in lrs:
        return float("inf")
    largest = 0.0
    for step, scale in enumerate(scales):
        for group, lr in zip(optimizer.param_groups, lrs):
            group["lr"] = lr * scale
        bare.step(optimizer, step)
        length = (path[step + 1] - path[0]).norm()
        if length > 0:
            largest = max(largest, float((bare.x - path[step + 1]).norm() / length))
    return largest


def _share_kept(case: Case, dtype: torch.dtype) -> float:
    """How much of a displacement is left after a dozen steps without Mechanic, at a learning rate of almost 0."""
    ends = []
    start = _Problem(case, dtype).x
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(5), dtype=start.dtype)
    displacement = 0.1 * (start + start.std() * noise)  # along x for those that project it
    for is_displaced in (False, True):
        problem = _Problem(case, dtype)
        optimizer = case.make(problem.model, 1e-6)
        for step in range(STEPS):
            if step == 6 and is_displaced:
                problem.x = problem.x + displacement
            generator = torch.Generator().manual_seed(100 + step)
            for p in problem.model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            torch.manual_seed(step)
            optimizer.step()
        ends.append(problem.x)
    return float((ends[1] - ends[0]) @ displacement / (displacement @ displacement))


def _resumes(case: Case, dtype: torch.dtype, *, is_wrapped: bool) -> bool:
    """Whether a run that is loaded into new objects goes on bit for bit."""

    def new() -> tuple[_Problem, Optimizer]:
        problem = _Problem(case, dtype)
        optimizer = case.make(problem.model, 1e-3)
        return problem, Mechanic(optimizer) if is_wrapped else optimizer

    runs = [new(), new()]
    for step in range(8):
        runs[0][0].step(runs[0][1], step)
    try:
        file = io.BytesIO()
        torch.save((runs[0][0].model.state_dict(), runs[0][1].state_dict()), file)
        file.seek(0)
        saved = torch.load(file, weights_only=False)
        runs[1][0].model.load_state_dict(saved[0])
        runs[1][1].load_state_dict(saved[1])
        for step in range(8, 12):
            for problem, optimizer in runs:
                problem.step(optimizer, step)
    except Exception:
        return False
    return torch.equal(runs[0][0].x, runs[1][0].x)


def _words(error: Exception) -> str:
    text = " ".join([str(error), *getattr(error, "__notes__", [])])
    return f"{type(error).__name__}: {' '.join(text.split())}"


def _short(words: str) -> str:
    """The reason of an error in a few words."""
    for pattern, reason in (
        (r"its (\S+) is a position of", "keeps a position of its own"),
        (r"train\(\) and eval\(\)", "moves the parameters by `train()` and `eval()`"),
        (r"state_dict\(\) has no", "its `state_dict()` has no place for Mechanic's state"),
        (r"its next step would move", "moves a displaced parameter back"),
        (r"has no param_groups", "has no `param_groups`"),
        (r"train mode", "keeps a position of its own, by `train()` and `eval()`"),
        (r"CUDA required", "needs CUDA"),
        (r"NotImplementedError", "steps in the backward pass, not in `step()`"),
    ):
        if re.search(pattern, words):
            return reason
    return words.partition(": ")[2].split(". ")[0][:80].replace("|", "/")


# Packages.


def _of_pytorch_optimizer() -> Iterator[Case]:
    import pytorch_optimizer as package

    needs = {"ranger21": {"num_iterations": 100}, "bsam": {"num_data": 100}}
    sgd = torch.optim.SGD

    def registered(name: str, model: nn.Module, lr: float | None) -> Optimizer:
        rate = 1e-3 if lr is None else lr
        if name == "spectralsphere":
            return package.load_optimizer(name)([p for p in model.parameters() if p.ndim == 2], lr=rate)
        if name == "distributedmuon":
            groups = [
                {"params": [p for p in model.parameters() if (p.ndim == 2) == is_muon], "use_muon": is_muon, "lr": rate}
                for is_muon in (True, False)
            ]
            return package.load_optimizer(name)(groups)
        return package.create_optimizer(model, name, lr=rate, **needs.get(name, {}))

    for name in package.get_supported_optimizers():
        make = functools.partial(registered, name)
        yield Case(name, make, keeps_graph=name in ("adahessian", "sophiah"))
    wrappers: dict[str, Callable[[nn.Module, float], Optimizer]] = {
        "Lookahead": lambda model, lr: package.Lookahead(sgd(model.parameters(), lr=lr)),
        "OrthoGrad": lambda model, lr: package.OrthoGrad(sgd(model.parameters(), lr=lr)),
        "PCGrad": lambda model, lr: package.PCGrad(sgd(model.parameters(), lr=lr)),
        "SafeFP16Optimizer": lambda model, lr: package.SafeFP16Optimizer(sgd(model.parameters(), lr=lr)),
        "ScheduleFreeWrapper": lambda model, lr: package.ScheduleFreeWrapper(sgd(model.parameters(), lr=lr)),
        "TRAC": lambda model, lr: package.TRAC(sgd(model.parameters(), lr=lr)),
        "SAM": lambda model, lr: package.SAM(model.parameters(), sgd, lr=lr),
        "FriendlySAM": lambda model, lr: package.FriendlySAM(model.parameters(), sgd, lr=lr),
        "LookSAM": lambda model, lr: package.LookSAM(model.parameters(), sgd, lr=lr),
        "WSAM": lambda model, lr: package.WSAM(model, model.parameters(), sgd, lr=lr),
    }

    def wrapped(name: str, model: nn.Module, lr: float | None) -> Optimizer:
        return wrappers[name](model, 1e-3 if lr is None else lr)

    for name in wrappers:
        yield Case(name, functools.partial(wrapped, name))


def _of_timm() -> Iterator[Case]:
    optim = _timm_optim()

    def make(name: str, model: nn.Module, lr: float | None) -> Optimizer:
        return optim.create_optimizer_v2(model, opt=name, lr=1e-3 if lr is None else lr)

    for name in (*optim.list_optimizers(), "lookahead_sgd"):
        yield Case(name, functools.partial(make, name), keeps_graph=name == "adahessian")


def _timm_optim() -> Any:
    """timm's optimizers, which need torch alone, also where torchvision, which its models need, is missing."""
    if importlib.util.find_spec("torchvision") is None and "timm" not in sys.modules:
        spec = importlib.util.find_spec("timm")
        assert spec is not None
        for name in ("timm", "timm.models"):
            module = types.ModuleType(name)
            folders = spec.submodule_search_locations or []
            module.__path__ = [str(Path(each, *name.split(".")[1:])) for each in folders]
            sys.modules[name] = module
        vars(sys.modules["timm.models"])["group_parameters"] = None  # for decay by layers only
    return importlib.import_module("timm.optim")


def _of_bitsandbytes() -> Iterator[Case]:
    from bitsandbytes import optim

    return _of_low_precision(optim)


def _of_torchao() -> Iterator[Case]:
    from torchao import optim

    return _of_low_precision(optim)


def _of_low_precision(optim: types.ModuleType) -> Iterator[Case]:
    """All optimizers of a module that quantizes states of 4,096 elements and more."""
    for name in sorted(vars(optim)):
        cls = getattr(optim, name)
        if isinstance(cls, type) and issubclass(cls, Optimizer):
            settings = {"momentum": 0.9} if re.search("SGD|LARS", name) else {}

            def make(model: nn.Module, lr: float | None, cls: Any = cls, settings: Any = settings) -> Optimizer:
                return cls(model.parameters(), lr=1e-3 if lr is None else lr, **settings)

            yield Case(name, make, width=64, dtypes=(torch.float32,))


def _of_heavyball() -> Iterator[Case]:
    import heavyball

    for name in sorted(vars(heavyball)):
        cls = getattr(heavyball, name)
        if isinstance(cls, type) and issubclass(cls, Optimizer) and not name.endswith(("Base", "Opt")):

            def make(model: nn.Module, lr: float | None, cls: Any = cls) -> Optimizer:
                if cls is heavyball.SAMWrapper:
                    return cls(list(model.parameters()), heavyball.SGD(list(model.parameters()), compile_step=False))
                return cls(list(model.parameters()), lr=1e-3 if lr is None else lr, compile_step=False)

            yield Case(name, make, dtypes=(torch.float32,))


PACKAGES: dict[str, Callable[[], Iterator[Case]]] = {
    "pytorch_optimizer": _of_pytorch_optimizer,
    "timm": _of_timm,
    "torchao": _of_torchao,
    "bitsandbytes": _of_bitsandbytes,
    "heavyball": _of_heavyball,
}


def verdicts(package: str, part: int = 0, parts: int = 1) -> dict[str, Verdict]:
    """Sort a package's optimizers, or each ``parts``-th of them; in a process group of one rank, which some need."""
    return run(_verdicts, 1, package, part, parts, timeout=280)[0]


def _verdicts(package: str, part: int, parts: int) -> dict[str, Verdict]:
    return {case.name: sort(case) for case in list(PACKAGES[package]())[part::parts]}


def names(package: str) -> set[str]:
    """Those of all its optimizers."""
    return run(_names, 1, package)[0]


def _names(package: str) -> set[str]:
    return {case.name for case in PACKAGES[package]()}


# The tables in the docs.


def label(verdict: Verdict) -> str:
    """An outcome and its reason, as the first column has them."""
    return f"{verdict.outcome}: {verdict.reason}" if verdict.reason else verdict.outcome


def table(found: dict[str, Verdict]) -> list[str]:
    """The rows of a table: a row for each outcome and reason."""
    rows: dict[Verdict, list[str]] = {}
    for name, verdict in found.items():
        rows.setdefault(verdict, []).append(name)

    def place(row: tuple[Verdict, list[str]]) -> tuple[int, int, str]:
        return OUTCOMES.index(row[0].outcome), -len(row[1]), row[0].reason

    lines = ["| outcome | | optimizers |", "|---|---|---|"]
    for verdict, members in sorted(rows.items(), key=place):
        listed = ", ".join(f"`{name}`" for name in sorted(members, key=str.lower))
        lines.append(f"| {label(verdict)} | {len(members)} | {listed} |")
    return lines


def verdicts_in_docs(package: str) -> dict[str, str] | None:
    """The label of each optimizer in the page that has a table of the installed version; ``None`` if none has."""
    first, last = _marks(package)
    for page in sorted(DOCS.glob("*.md")):
        _, found, rest = page.read_text().partition(first)
        if found:
            rows = [line.split("|")[1:4] for line in rest.partition(last)[0].strip().splitlines()[2:]]
            return {name: row[0].strip() for row in rows for name in re.findall("`([^`]+)`", row[2])}
    return None


def write_tables(packages: Sequence[str]) -> None:
    """Sort, and replace the tables in the pages that have them."""
    for package in packages:
        first, last = _marks(package)
        text = "\n".join([first, *table(verdicts(package)), last])
        pattern = re.compile(rf"<!-- optimizers of {package} \S+ -->.*?{re.escape(last)}", re.DOTALL)
        for page in DOCS.glob("*.md"):
            page.write_text(pattern.sub(text.replace("\\", r"\\"), page.read_text()))


def _marks(package: str) -> tuple[str, str]:
    """The comments around a package's table, the first with its version."""
    version = importlib.metadata.version(package)
    return f"<!-- optimizers of {package} {version} -->", f"<!-- end of {package} -->"


if __name__ == "__main__":
    write_tables([name for name in PACKAGES if importlib.util.find_spec(name) is not None])
