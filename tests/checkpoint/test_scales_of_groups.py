"""A scale per group is saved in its group: by parameter names, resharded, and refused where numbers differ."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manic import Mechanic
from manic.checkpoint import Checkpointer
from manic.inspect import inspect, main
from manic.testing import run
from support.runs import Run

LAYOUTS = [("single", 1), ("ddp", 2), ("fsdp2", 3), ("zero1", 2), ("fsdp1-orig", 2)]
SETTING: dict[str, Any] = {"variant": "multiplicative", "scale": "per group", "s_init": 1e-2}
Trained = tuple[list[list[float]], dict[str, Tensor]]


def train_and_save(layout: str, directory: str) -> Trained:
    started = Run(layout, "adamw by group", directory, noise=False, setting=SETTING)
    started.train(6)
    started.checkpointer.save(6)
    return started.train(10), started.setup.gather()


@functools.cache
def saved(layout: str, world_size: int) -> tuple[tempfile.TemporaryDirectory[str], Trained]:
    folder = tempfile.TemporaryDirectory(prefix="manic-groups-")
    return folder, run(train_and_save, world_size, layout, folder.name)[0]


def load_each(layout: str, world_size: int, sources: dict[tuple[str, int], tuple[str, Trained]]) -> None:
    for source, (directory, (scales, parameters)) in sources.items():
        resumed = Run(layout, "adamw by group", directory, noise=False, setting=SETTING)
        if layout in ("ddp", "zero1"):  # DDP's first backward sums in another order than later ones
            resumed.backward()
        resumed.checkpointer.load()
        found, gathered = resumed.train(10), resumed.setup.gather()
        resumed.setup.mechanic.check_consistency()
        if source == (layout, world_size):
            assert found == scales
            assert all(torch.equal(gathered[name], value) for name, value in parameters.items())
        for mine, theirs in zip(found, scales):
            assert mine == pytest.approx(theirs, rel=1e-9), source
        for name, value in parameters.items():
            torch.testing.assert_close(gathered[name], value, rtol=1e-9, atol=1e-9, msg=f"{source}: {name}")


@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS)
def test_resumes_from_other_layouts(layout: str, world_size: int) -> None:
    sources = {each: (saved(*each)[0].name, saved(*each)[1]) for each in LAYOUTS}
    run(load_each, world_size, layout, world_size, sources, timeout=400)


def resume_a_pipeline(directory: str) -> None:
    """Each stage has parameters of one group only, and the other group's scale from the other stage."""
    first = Run("pipeline", "adamw by group", directory, setting=SETTING)
    first.train(5)
    first.checkpointer.save(5)
    resumed = Run("pipeline", "adamw by group", directory, setting=SETTING)
    resumed.checkpointer.load()
    assert resumed.train(5) == first.train(5)
    resumed.setup.mechanic.check_consistency()


def test_a_pipeline_whose_stages_have_empty_groups(tmp_path: Path) -> None:
    run(resume_a_pipeline, 2, str(tmp_path))


def make(groups: list[str], **options: Any) -> tuple[nn.ParameterDict, Mechanic]:
    """A model of four parameters by name, in groups."""
    generator = torch.Generator().manual_seed(0)
    model = nn.ParameterDict({name: nn.Parameter(torch.randn(5, generator=generator)) for name in "abcd"})
    base = torch.optim.AdamW([{"params": [model[name] for name in names]} for names in groups], lr=1.0)
    return model, Mechanic(base, **{"scale": "per group", **options})


def take_steps(model: nn.ParameterDict, optimizer: Mechanic, steps: range) -> list[float]:
    for step in steps:
        for place, (_, p) in enumerate(sorted(model.items())):
            p.grad = (p.detach() - place) * (1.0 + 0.1 * step)
        optimizer.step()
    scales: list[float] = optimizer.scale.tolist()
    return scales


def test_groups_in_another_order_find_their_scales(tmp_path: Path) -> None:
    model, optimizer = make(["ab", "c", "d"])
    scales = take_steps(model, optimizer, range(8))
    Checkpointer(tmp_path, model, optimizer).save(8)
    other, reordered = make(["d", "ba", "c"])
    Checkpointer(tmp_path, other, reordered).load()
    assert reordered.scale.tolist() == [scales[2], scales[0], scales[1]]
    a, b, c = take_steps(model, optimizer, range(8, 12))
    assert take_steps(other, reordered, range(8, 12)) == pytest.approx([c, a, b], rel=1e-6)


@pytest.mark.parametrize(("groups", "options", "message"), [
    (["ab", "cd"], {}, "a scale for each of 3 param.* this one multiplicative with a scale for each of 2 .* before gr"),
    (["a", "b", "c", "d"], {}, r"a scale for each of 3 param group\(s\), this one .* each of 4 .*tuner restarts"),
    (["ab", "c", "d"], {"scale": "global"}, "a scale for each of 3 .*, this one multiplicative; pass the same variant"),
    (["ab", "c", "d"], {"variant": "optax", "scale": "global"}, "multiplicative with a scale .*, this one optax; pass"),
])  # fmt: skip
def test_other_numbers_of_scales_are_refused(
    groups: list[str], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model, optimizer = make(["ab", "c", "d"])
    take_steps(model, optimizer, range(4))
    Checkpointer(tmp_path, model, optimizer).save(4)
    other, unfit = make(groups, **options)
    before = {name: p.detach().clone() for name, p in other.items()}
    with pytest.raises(ValueError, match=message if len(groups) > 2 else "in this run they share a group|" + message):
        Checkpointer(tmp_path, other, unfit).load()
    assert all(torch.equal(other[name], value) for name, value in before.items())
    assert not unfit.scale.any() or options.get("variant") == "optax"
    if len(groups) == 3:
        with pytest.raises(ValueError, match=message):
            unfit.load_state_dict(optimizer.state_dict())
    else:
        with pytest.raises(ValueError, match=rf"has 3 parameter groups, the optimizer {len(groups)}"):
            unfit.load_state_dict(optimizer.state_dict())


def test_a_global_scale_is_refused(tmp_path: Path) -> None:
    model, optimizer = make(["ab", "cd"], scale="global")
    take_steps(model, optimizer, range(4))
    Checkpointer(tmp_path, model, optimizer).save(4)
    other, unfit = make(["ab", "cd"])
    message = (
        "of variant multiplicative, this one multiplicative with a scale for each of 2 param.*pass the same .* scale"
    )
    with pytest.raises(ValueError, match=message):
        Checkpointer(tmp_path, other, unfit).load()
    with pytest.raises(ValueError, match=message):
        unfit.load_state_dict(optimizer.state_dict())


def test_inspect_shows_each_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = make(["ab", "c", "d"])
    optimizer.param_groups[1]["lr"] = 0.5
    scales = take_steps(model, optimizer, range(4))
    path = Checkpointer(tmp_path, model, optimizer).save(4)
    assert path is not None
    found = inspect(path)
    assert sorted(tuner["scale"] for tuner in found["tuners"]) == sorted(scales)
    effective = sorted(group["effective_lr"] for group in found["groups"])
    assert effective == sorted([scales[0], 0.5 * scales[1], scales[2]])
    assert main([str(path)]) == 0
    assert "variant multiplicative with a scale for each of 3 param group(s)" in capsys.readouterr().out
