"""The Python blocks of docs/frameworks.md run: those of a section one after the other, as a reader would copy them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manic
from manic.testing import run
from support.accelerated import be_torchrun
from support.language_model import llama, texts, tokenizer
from support.pages import DOCS

STEPS = 3
PAGE = DOCS / "frameworks.md"
SECTIONS = {  # with the packages that each needs
    "Which class do I use": [],
    "Accelerate": ["accelerate", "tensorboard"],
    "transformers": ["transformers", "accelerate", "tensorboard"],
    "PEFT": ["peft", "transformers"],
    "TRL": ["trl", "peft", "transformers"],
    "TensorBoard, Weights & Biases and others": ["tensorboard"],
}


def blocks(section: str) -> list[str]:
    _, text = PAGE.read_text().split(f"\n## {section}\n")
    return re.findall(r"```python\n(.*?)```", text.partition("\n## ")[0], re.DOTALL)


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layer(x) - labels).square().mean()}


def names_in(section: str) -> dict[str, Any]:
    """What the section takes for granted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(8 * STEPS, 4)
    rows = torch.utils.data.TensorDataset(x, x[:, :2].sin())
    names: dict[str, Any] = {"torch": torch, "steps": STEPS, "step": 1, "model": model}
    if section == "Accelerate":
        names["loader"] = torch.utils.data.DataLoader(rows, batch_size=8)
    elif section == "transformers":
        names |= {"model": WithLoss(), "dataset": [{"x": each, "labels": each[:2].sin()} for each in x]}
    elif section == "PEFT":
        names["model"] = llama()
    elif section == "TRL":
        from datasets import Dataset

        names |= {
            "model": llama(), "tokenizer": tokenizer(), "dataset": Dataset.from_dict({"text": texts(8 * STEPS)}),
        }  # fmt: skip
    elif section.startswith("TensorBoard"):
        names |= {"loss": torch.ones(()), "logger": SimpleNamespace(log=lambda values, step: None)}
    return names


def execute(section: str, folder: str) -> float:
    """Run the section's blocks, and a step if they have none; S."""
    os.chdir(folder)
    be_torchrun()
    names = names_in(section)
    for index, block in enumerate(blocks(section)):
        exec(compile(block, f"{section}, block {index}", "exec"), names)
    mechanic = manic.unwrap(names["trainer"] if "trainer" in names else names["optimizer"])
    for parameter in names["model"].parameters():
        parameter.grad = torch.ones_like(parameter)
    mechanic.step()
    return float(mechanic.scale.min())


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.usefixtures("new_processes")
def test_blocks_run(section: str, tmp_path: Path) -> None:
    for package in SECTIONS[section]:
        pytest.importorskip(package, reason=f"{package} is not installed")
    (scale,) = run(execute, 1, section, str(tmp_path))
    assert scale > 0
