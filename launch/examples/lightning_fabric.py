"""Lightning Fabric with FSDP2: train a small GPT on bytes, save, resume, and print the learned scale.

    pip install . lightning
    torchrun --standalone --nproc-per-node 2 launch/examples/lightning_fabric.py --steps 100 --output runs/fabric

A second call with the same --output and more --steps resumes where the first one ended.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from manic import Mechanic

BATCH, LENGTH, WIDTH, LAYERS = 16, 64, 64, 2
TOTAL = 200  # the length of the schedule, whatever --steps says


class GPT(nn.Module):
    """A causal transformer over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, device=tokens.device)
        x = self.embed(tokens) + self.place(torch.arange(LENGTH, device=tokens.device))
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(x)


def shard(model: GPT, mesh: DeviceMesh) -> GPT:
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


def batch_of(step: int, rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """A rank's part of the batch, drawn from the source of a module of Python's standard library."""
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=generator)[rank::world_size]
    rows = torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()])
    return rows[:, :-1], rows[:, 1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=TOTAL)
    parser.add_argument("--output", type=Path, default=Path("runs/fabric"))
    options = parser.parse_args()

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    strategy = ModelParallelStrategy(shard, data_parallel_size=world_size, tensor_parallel_size=1)
    fabric = Fabric(accelerator="auto", devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")), strategy=strategy)
    fabric.launch()
    fabric.seed_everything(0)

    model = fabric.setup_module(GPT())  # shards the model, so the optimizer comes after it
    mechanic = Mechanic(torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1))
    optimizer = fabric.setup_optimizers(mechanic)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(mechanic, T_max=TOTAL)

    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler.state_dict(), "step": 0}
    checkpoints = sorted(options.output.glob("step_*"))
    if checkpoints:
        fabric.load(checkpoints[-1], state)
        scheduler.load_state_dict(state["scheduler"])  # Fabric leaves this to you under FSDP2
        fabric.print(f"resumed at step {state['step']}")

    for step in range(state["step"], options.steps):
        tokens, targets = fabric.to_device(batch_of(step, fabric.global_rank, world_size))
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        scheduler.step()
        if (step + 1) % 20 == 0 or step + 1 == options.steps:
            mean = fabric.all_reduce(loss.detach())
            values = {name: float(value) for name, value in mechanic.metrics().items()}
            scale, lr = values["scale"], values["effective_lr/0"]
            fabric.print(f"step {step + 1:4}  loss {mean:.3f}  S {scale:.3g}  effective lr {lr:.3g}")

    if options.steps > state["step"]:
        state |= {"scheduler": scheduler.state_dict(), "step": options.steps}
        fabric.save(options.output / f"step_{options.steps:06}", state)
    fabric.barrier()  # a collective that gloo is still cleaning up would abort the exit
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
