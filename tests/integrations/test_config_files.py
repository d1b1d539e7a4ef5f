"""Config files name a ready-made class by its dotted path, with options of the base and of Mechanic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import manic

CONFIG = """
model:
  width: 3
optimizer:
  class_path: manic.AdamW
  init_args:
    lr: 1.0
    weight_decay: 0.1
    betas: [0.9, 0.95]
    tuner_betas: [0.9]
    nonfinite: skip
"""


def check(optimizer: object) -> None:
    assert type(optimizer) is manic.AdamW
    assert optimizer.defaults["weight_decay"] == 0.1
    assert tuple(optimizer.defaults["betas"]) == (0.9, 0.95)
    assert "nonfinite=skip" in repr(optimizer)
    assert "betas=(0.9,)" in repr(optimizer)


@pytest.mark.framework("LightningCLI", "`class_path: manic.AdamW` with options of both, checked by the parser")
def test_lightning_cli(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    pytest.importorskip("jsonargparse", reason="jsonargparse is not installed")
    from lightning.pytorch import LightningModule
    from lightning.pytorch.cli import LightningCLI

    class Net(LightningModule):
        def __init__(self, width: int = 2) -> None:
            super().__init__()
            self.layer = nn.Linear(width, 1)

    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    cli = LightningCLI(Net, run=False, args=["--config", str(file)], save_config_callback=None)
    check(cli.model.configure_optimizers())
    file.write_text(CONFIG.replace("weight_decay", "weight_decy"))
    with pytest.raises(SystemExit):
        LightningCLI(Net, run=False, args=["--config", str(file)], save_config_callback=None)


@pytest.mark.framework("Hydra", "`_target_: manic.AdamW` with options of both")
def test_hydra() -> None:
    utils = pytest.importorskip("hydra.utils", reason="hydra-core is not installed")
    config = {
        "_target_": "manic.AdamW", "lr": 1.0, "weight_decay": 0.1, "betas": [0.9, 0.95], "tuner_betas": [0.9],
        "nonfinite": "skip",
    }  # fmt: skip
    check(utils.instantiate(config, params=[torch.ones(3, requires_grad=True)]))
