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

pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.usefixtures("new_processes")

STEPS, BATCH = 10, 4
WORDS = [
    "the",
    "scale",
    "of",
    "a",
    "learning",
    "rate",
    "is",
    "found",
    "while",
    "the",
    "model",
    "trains",
    "and",
    "then",
    "it",
    "stays",
]


def trainer(folder: str, lora: bool, seed: int = 0, **settings: Any) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    be_torchrun()
    words = ["<pad>", "<eos>", "<unk>", *sorted(set(WORDS))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(WORDS), (STEPS * BATCH * 2,), generator=generator).tolist()
    texts = [" ".join((WORDS * 2)[start : start + 12]) for start in starts]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    torch.manual_seed(seed)
    arguments = SFTConfig(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=BATCH, lr_scheduler_type="constant",
        max_grad_norm=0.0, logging_steps=1, use_cpu=True, bf16=False, max_length=32, report_to="none",
        gradient_checkpointing=False, disable_tqdm=True, **{"save_strategy": "no", **settings},
    )  # fmt: skip
    return SFTTrainer(
        model, arguments, train_dataset=Dataset.from_dict({"text": texts}), processing_class=tokenizer,
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
