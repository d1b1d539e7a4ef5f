"""python -m manic.inspect describes a checkpoint from its files alone, and detects damage."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import fully_shard

from manic import Mechanic
from manic.checkpoint import Checkpointer
from manic.inspect import inspect, main
from manic.testing import run
from support.tuners import rows_of, state_of


def save(directory: str) -> tuple[float, float]:
    """A model of two groups, and its scale after four steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).bfloat16()
    fully_shard(model)
    groups = [{"params": model[0].parameters(), "weight_decay": 0.3}, {"params": model[1].parameters(), "lr": 0.5}]
    optimizer = Mechanic(torch.optim.AdamW(groups, lr=2.0), s_init=1e-3, variant="optax")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    checkpointer = Checkpointer(f"{directory}/run", model, optimizer)
    for step in range(1, 5):
        model(torch.ones(4, 8).bfloat16()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2 == 0:
            checkpointer.save(step)
    scheduler.step()
    for flat in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options)))
        dcp.save(state, checkpoint_id=f"{directory}/{'flat' if flat else 'nested'}")
    return optimizer.scale.item(), rows_of(state_of(optimizer))["m"][0].item()


@functools.cache
def saved() -> tuple[tempfile.TemporaryDirectory[str], tuple[float, float]]:
    directory = tempfile.TemporaryDirectory(prefix="manic-inspect-")
    return directory, run(save, 2, directory.name)[0]


@pytest.fixture
def checkpoint() -> Path:
    return Path(saved()[0].name, "run", "step_00000004")


def test_reports_the_saved_state(checkpoint: Path) -> None:
    found = inspect(checkpoint)
    assert found == json.loads(json.dumps(found))
    assert found["integrity"] == {"verified": "full", "problems": []}
    manifest = found["manifest"]
    assert (manifest["step"], manifest["world_size"], manifest["torch"]) == (4, 2, torch.__version__)
    assert manifest["layout"] == {"Shard(dim=0) on 2 ranks": 4}
    assert found["bytes"] == sum(file.stat().st_size for file in checkpoint.iterdir())

    (tuner,) = found["tuners"]
    fields = tuner["fields"]
    assert (tuner["scale"], fields["m"][0]) == saved()[1]
    assert (tuner["updates"], tuner["variant"], fields["betas"][0]) == (4, "optax", 0.9)
    groups = sorted(found["groups"], key=lambda group: group["lr"])
    assert [(group["number"], group["lr"], group["weight_decay"]) for group in groups] == [
        (2, 0.5, 0.01),
        (2, 2.0, 0.3),
    ]
    assert [group["effective_lr"] for group in groups] == [0.5 * tuner["scale"], 2.0 * tuner["scale"]]

    elements = 8 * 8 + 8 + 8 * 4 + 4
    expected = {"number": 4, "elements": elements, "bytes": 2 * elements, "dtypes": ["bfloat16"]}
    assert found["tensors"]["model"] == found["tensors"]["optimizer mechanic_x_ref"] == expected
    delta = {"number": 4, "elements": elements, "bytes": 4 * elements, "dtypes": ["float32"]}
    assert found["tensors"]["optimizer mechanic_delta"] == delta


@pytest.mark.parametrize("form", ["nested", "flat"])
def test_reads_checkpoints_of_dcp_alone(form: str, checkpoint: Path) -> None:
    found = inspect(checkpoint.parents[1] / form)
    assert found["integrity"]["verified"] == "no manifest"
    assert found["manifest"] is None
    assert [tuner["scale"] for tuner in found["tuners"]] == [saved()[1][0]]
    assert sorted(group["lr"] for group in found["groups"]) == [0.25, 1.0]
    assert found["tensors"]["optimizer mechanic_delta"]["elements"] == 108


def test_names_a_damaged_file_and_reads_nothing(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    content = bytearray((copy / ".metadata").read_bytes())
    content[100] ^= 1
    (copy / ".metadata").write_bytes(content)
    found = inspect(copy)
    assert "tuners" not in found
    (problem,) = found["integrity"]["problems"]
    assert problem.startswith(".metadata differs from what was written")
    assert inspect(copy, "size")["integrity"]["problems"] == [problem]  # the index is always digested

    copy = Path(shutil.copytree(checkpoint, tmp_path / "another"))
    content = bytearray((copy / "__1_0.distcp").read_bytes())
    content[100] ^= 1
    (copy / "__1_0.distcp").write_bytes(content)
    assert inspect(copy, "size")["integrity"]["problems"] == []


def test_a_reader_that_stops_reading_is_no_error(checkpoint: Path) -> None:
    command = f"{sys.executable} -m manic.inspect --json {checkpoint} | head -n 0; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_command_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "manic.inspect", str(checkpoint)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stderr == ""
    for words in ("step       4", "on 2 rank(s)", "every byte is as written", f"scale {saved()[1][0]:.6g}"):
        assert words in shown.stdout

    assert main([str(checkpoint.parent)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == [str(checkpoint.with_name(f"step_0000000{step}")) for step in (2, 4)]

    assert main([str(checkpoint.parent), "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [each["manifest"]["step"] for each in found] == [2, 4]

    copy = Path(shutil.copytree(checkpoint.parent, tmp_path / "copy"))
    (copy / "step_00000002" / "__1_0.distcp").unlink()
    assert main([str(copy)]) == 1
    assert "DAMAGED: __1_0.distcp is missing" in capsys.readouterr().out
    assert main([str(tmp_path)]) == 2
    assert main([str(tmp_path / "not there")]) == 2
