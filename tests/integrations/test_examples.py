"""Each of launch/examples trains, and a second call resumes and ends bit for bit where one call ends."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from support.torchrun import run_example

pytestmark = pytest.mark.timeout(900)  # each calls torchrun three times


def check(example: str, weights: str, steps: int, folder: Path) -> None:
    from safetensors.torch import load_file

    once = run_example(example, folder / "once", "--steps", str(2 * steps))
    run_example(example, folder / "twice", "--steps", str(steps))
    resumed = run_example(example, folder / "twice", "--steps", str(2 * steps))
    whole, again = (load_file(folder / name / weights.format(2 * steps)) for name in ("once", "twice"))
    assert whole.keys() == again.keys()
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name
    losses = [float(each) for each in re.findall(r"loss\D+([0-9.]+)", once)]
    assert losses[-1] < losses[0]
    assert once.splitlines()[-1] == resumed.splitlines()[-1]
    assert re.search(r"S [0-9.e-]+, lr [0-9.e-]+", resumed)


@pytest.mark.framework("Accelerate", "example `accelerate_fsdp2.py`, 2 ranks: trains, resumes bit for bit")
def test_accelerate_fsdp2(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    check("accelerate_fsdp2.py", "model/model.safetensors", 20, tmp_path)


@pytest.mark.framework("transformers", "example `hf_trainer.py`, 2 ranks: trains, resumes bit for bit")
def test_hf_trainer(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    check("hf_trainer.py", "checkpoint-{}/model.safetensors", 20, tmp_path)


@pytest.mark.framework("PEFT", "example `lora_peft.py`, 2 ranks: trains, resumes bit for bit")
def test_lora_peft(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    check("lora_peft.py", "lora/adapter_model.safetensors", 20, tmp_path)
