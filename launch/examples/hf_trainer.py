"""transformers' Trainer with manic: train a small Llama on bytes, save, and resume.

torchrun --nproc-per-node 2 launch/examples/hf_trainer.py --output runs/trainer --steps 100
torchrun --nproc-per-node 2 launch/examples/hf_trainer.py --output runs/trainer  # goes on from step 100
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

import manic
from manic.integrations.transformers import MechanicCallback

STEPS = 200  # the length of the schedule
LENGTH = 64


class Bytes(Dataset[dict[str, torch.Tensor]]):
    """The source of this Python's argparse and others, cut into sequences; no download."""

    def __init__(self) -> None:
        text = b"".join(file.read_bytes() for file in sorted(Path(argparse.__file__).parent.glob("*.py")))
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Stop(TrainerCallback):
    """Saves and stops after a step, so that another call can go on from there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            control.should_save = control.should_training_stop = True


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"stop after so many; the schedule is for {STEPS}")
    options = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=LENGTH, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(options.output), max_steps=STEPS, per_device_train_batch_size=8, lr_scheduler_type="cosine",
        learning_rate=1.0, weight_decay=0.1, max_grad_norm=1.0, logging_steps=10, save_strategy="no", seed=0,
        use_cpu=not torch.cuda.is_available(), report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        LlamaForCausalLM(config),
        arguments,
        train_dataset=Bytes(),
        optimizer_cls_and_kwargs=(manic.AdamW, {"lr": 1.0, "betas": (0.9, 0.95)}),
        callbacks=[Stop(options.steps)],
    )
    MechanicCallback.add_to(trainer)
    last = get_last_checkpoint(options.output) if options.output.is_dir() else None
    if last is not None and int(last.rpartition("-")[2]) >= options.steps:
        print("nothing left to train")  # the Trainer would take one more step
    else:
        trainer.train(resume_from_checkpoint=last)
        metrics = manic.unwrap(trainer.optimizer).metrics(to_host=True)
        if trainer.is_world_process_zero():
            done = trainer.state.global_step
            print(f"S {metrics['scale']:.3e}, lr {metrics['effective_lr/0']:.3e}, after step {done}")
    trainer.accelerator.wait_for_everyone()  # a collective that gloo is still cleaning up would abort the exit
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
