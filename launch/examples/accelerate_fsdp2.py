"""Accelerate with FSDP2 and manic: train a small transformer on bytes, save, and resume.

torchrun --nproc-per-node 2 launch/examples/accelerate_fsdp2.py --output runs/accelerate --steps 100
torchrun --nproc-per-node 2 launch/examples/accelerate_fsdp2.py --output runs/accelerate  # goes on from step 100
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import manic
from manic.integrations.accelerate import log

STEPS = 200  # the length of the schedule
BATCH, LENGTH, WIDTH = 8, 64, 64


class Block(nn.TransformerEncoderLayer):
    def __init__(self) -> None:
        super().__init__(WIDTH, nhead=4, dim_feedforward=4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)


class Model(nn.Module):
    """Predicts the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.position.weight
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        return self.head(x)


class Progress:
    """The number of steps taken, which Accelerate saves with the rest."""

    step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def data() -> TensorDataset:
    """The source of this Python's argparse and others, cut into sequences; no download."""
    text = b"".join(file.read_bytes() for file in sorted(Path(argparse.__file__).parent.glob("*.py")))
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    rows = tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    return TensorDataset(rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"stop after so many; the schedule is for {STEPS}")
    options = parser.parse_args()

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = Accelerator(
        fsdp_plugin=plugin, cpu=not torch.cuda.is_available(), log_with="tensorboard", project_dir=options.output,
        step_scheduler_with_optimizer=False,  # one step of the schedule a step, on any number of ranks
    )  # fmt: skip
    if not torch.cuda.is_available():  # on CPUs Accelerate replicates the model, unless it is told what it tells GPUs
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    torch.manual_seed(0)
    model = Model()
    optimizer = manic.AdamW(model.parameters(), lr=1.0, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    loader = DataLoader(data(), batch_size=BATCH, drop_last=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    accelerator.init_trackers("tensorboard")

    saved = sorted(options.output.glob("state-*"))
    if saved:
        accelerator.load_state(saved[-1])
        accelerator.print(f"resumed at step {progress.step}")
    if progress.step >= options.steps:
        accelerator.print("nothing left to train")
        accelerator.end_training()
        return

    for (tokens,) in accelerator.skip_first_batches(loader, progress.step):
        if progress.step >= options.steps:
            break
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        progress.step += 1
        if progress.step % 10 == 0:
            log(accelerator, {"loss": loss.item()}, optimizer, step=progress.step)
            metrics = manic.unwrap(optimizer).metrics(to_host=True)
            accelerator.print(
                f"step {progress.step}: loss {loss.item():.4f}, S {metrics['scale']:.3e}, "
                f"lr {metrics['effective_lr/0']:.3e}"
            )
    accelerator.save_state(options.output / f"state-{progress.step:06}")
    accelerator.save_model(model, options.output / "model")
    accelerator.wait_for_everyone()  # a collective that gloo is still cleaning up would abort the exit
    accelerator.end_training()


if __name__ == "__main__":
    main()
