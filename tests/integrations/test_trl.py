"""TRL's SFTTrainer: S is that of a plain run on its batches, and a resumed run ends bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import manic
from manic import Mechanic, unwrap
from manic.testing import run
from support.accelerated import be_torchrun
from support.language_model import llama, texts, tokenizer

pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.usefixtures("new_processes")

STEPS, BATCH = 10, 4


def trainer(folder: str, lora: bool, seed: int = 0, **settings: Any) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    be_torchrun()
    model = llama()
    torch.manual_seed(seed)
    arguments = SFTConfig(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=BATCH, lr_scheduler_type="constant",
        max_grad_norm=0.0, logging_steps=1, use_cpu=True, bf16=False, max_length=32, report_to="none",
        gradient_checkpointing=False, disable_tqdm=True, **{"save_strategy": "no", **settings},
    )  # fmt: skip
    return SFTTrainer(
        model, arguments, train_dataset=Dataset.from_dict({"text": texts(STEPS * BATCH * 2)}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None,
        optimizer_cls_and_kwargs=(manic.AdamW, {"lr": 1.0}),
    )  # fmt: skip


def scale_of(folder: str, lora: bool) -> tuple[float, float]:
    """S of the trainer's run and of a plain loop over the same batches."""
    by_trainer, plain = trainer(folder, lora), trainer(folder, lora)
    parameters = [p for p in plain.model.parameters() if p.requires_grad]
    optimizer = Mechanic(torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0))
    batches = iter(by_trainer.get_train_dataloader())
    plain.model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        plain.model(**next(batches)).loss.backward()
        optimizer.step()
    by_trainer.train()
    return unwrap(by_trainer.optimizer).scale.item(), optimizer.scale.item()


@pytest.mark.framework("TRL", "SFTTrainer, with and without LoRA: S of a plain run, to 6 digits in float32")
@pytest.mark.parametrize("lora", [False, True])
def test_finds_the_scale_of_a_plain_run(lora: bool, tmp_path: Path) -> None:
    ((found, expected),) = run(scale_of, 1, str(tmp_path), lora)
    assert found == pytest.approx(expected, rel=1e-6)
    assert found > 1e-6


def resume(folder: str, lora: bool) -> None:
    whole = trainer(folder, lora, save_strategy="steps", save_steps=STEPS // 2)
    whole.train()
    resumed = trainer(folder, lora, seed=1)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}")
    assert unwrap(whole.optimizer).scale == unwrap(resumed.optimizer).scale
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.framework("TRL", "SFTTrainer, with and without LoRA, 2 ranks: a resumed run ends bit for bit")
@pytest.mark.parametrize("lora", [False, True])
def test_resumes_bit_for_bit(lora: bool, tmp_path: Path) -> None:
    run(resume, 2, str(tmp_path), lora)


def scale_of_dpo(folder: str) -> float:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from manic.integrations.transformers import MechanicCallback

    be_torchrun()
    model, rows = llama(), texts(STEPS * BATCH)
    pairs = {"prompt": rows, "chosen": [" model trains" for _ in rows], "rejected": [" rate stays" for _ in rows]}
    arguments = DPOConfig(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=BATCH, logging_steps=1, use_cpu=True,
        bf16=False, max_length=32, report_to="none", gradient_checkpointing=False, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    optimizer = manic.AdamW(model.parameters())
    by_trainer = DPOTrainer(
        model, ref_model=llama(), args=arguments, train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer(), optimizers=(optimizer, None),
    )  # fmt: skip
    MechanicCallback.add_to(by_trainer)
    by_trainer.train()
    last = [each for each in by_trainer.state.log_history if "scale" in each][-1]
    assert last["scale"] == optimizer.scale.item()
    assert last["learning_rate"] == last["scale"] * last["base_learning_rate"]
    return last["scale"]


@pytest.mark.framework("TRL", "DPOTrainer, given an optimizer: trains, and logs S and S * lr")
def test_dpo_takes_an_optimizer(tmp_path: Path) -> None:
    (scale,) = run(scale_of_dpo, 1, str(tmp_path))
    assert scale > 1e-6
