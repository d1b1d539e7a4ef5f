"""LoRA with PEFT, Accelerate and manic: train a small Llama, adapt it to other text, save, and resume.

    torchrun --nproc-per-node 2 launch/examples/lora_peft.py --output runs/lora --steps 50
    torchrun --nproc-per-node 2 launch/examples/lora_peft.py --output runs/lora  # goes on from step 50

The base is trained on this Python's sources, and adapted to the same in capital letters. Each learns its learning rate.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

import manic

STEPS = 100  # the length of the schedule
LENGTH = 64


class Progress:
    """The number of steps taken, which Accelerate saves with the rest."""

    step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def data(capital: bool) -> Dataset[tuple[torch.Tensor, ...]]:
    """The source of this Python's argparse and others, cut into sequences; no download."""
    text = b"".join(file.read_bytes() for file in sorted(Path(argparse.__file__).parent.glob("*.py")))
    tokens = torch.frombuffer(bytearray(text.upper() if capital else text), dtype=torch.uint8).long()
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    return TensorDataset(rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))])


def fit(model: torch.nn.Module, rows: Dataset[tuple[torch.Tensor, ...]], until: int, state: Path) -> None:
    """Train ``model`` from where ``state`` is, or the start, to step ``until``, and save."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), step_scheduler_with_optimizer=False)
    optimizer = manic.AdamW((parameter for parameter in model.parameters() if parameter.requires_grad), lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    loader = DataLoader(rows, batch_size=8, drop_last=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if state.exists():
        accelerator.load_state(state)
        accelerator.print(f"resumed {state.name} at step {progress.step}")
    if progress.step >= until:
        return
    for (tokens,) in accelerator.skip_first_batches(loader, progress.step):
        if progress.step >= until:
            break
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        progress.step += 1
        if progress.step % 10 == 0:
            metrics = manic.unwrap(optimizer).metrics(to_host=True)
            accelerator.print(
                f"{state.name}, step {progress.step}: loss {loss.item():.4f}, S {metrics['scale']:.3e}, "
                f"lr {metrics['effective_lr/0']:.3e}"
            )
    accelerator.save_state(state)
    accelerator.wait_for_everyone()


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
    base = LlamaForCausalLM(config)
    fit(base, data(capital=False), STEPS, options.output / "base")

    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    fit(model, data(capital=True), options.steps, options.output / "adapter")
    accelerator = Accelerator()
    if accelerator.is_main_process:
        model.save_pretrained(options.output / "lora")
    accelerator.wait_for_everyone()  # a collective that gloo is still cleaning up would abort the exit
    accelerator.end_training()


if __name__ == "__main__":
    main()
