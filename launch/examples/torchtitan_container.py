"""torchtitan's containers and manic: train a small transformer in two model parts on bytes, save, and resume.

    torchrun --nproc-per-node 2 launch/examples/torchtitan_container.py --output runs/titan --steps 100
    torchrun --nproc-per-node 2 launch/examples/torchtitan_container.py --output runs/titan  # goes on from step 100

The loop is a short form of torchtitan's trainer, with its optimizers, schedulers and checkpoint manager.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.optimizer import LRSchedulersContainer, ParamGroupConfig

from manic.integrations.torchtitan import MechanicContainer

STEPS = 200  # the length of the schedule
BATCH, LENGTH, WIDTH = 8, 64, 64


class Part(nn.Module):
    """A part of a model that predicts the next byte; its modules have the names that they have in the whole model."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x, self.mask, is_causal=True) if isinstance(layer, nn.TransformerEncoderLayer) else layer(x)
        return x


def make() -> list[Part]:
    """Two model parts, as a pipeline schedule with virtual stages has them on one rank."""
    blocks = [
        nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        for _ in range(2)
    ]
    parts = [
        Part({"embed": nn.Embedding(256, WIDTH), "0": blocks[0]}),
        Part({"1": blocks[1], "head": nn.Linear(WIDTH, 256)}),
    ]
    for part in parts:
        for layer in part.layers.values():
            fully_shard(layer)
        fully_shard(part)
    return parts


def data() -> torch.Tensor:
    """The source of this Python's argparse and others, cut into sequences; no download."""
    text = b"".join(file.read_bytes() for file in sorted(Path(argparse.__file__).parent.glob("*.py")))
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)


class TrainState:
    """The number of steps taken, which torchtitan's trainer saves with the rest."""

    step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"stop after so many; the schedule is for {STEPS}")
    options = parser.parse_args()

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    parts = make()
    groups = [
        ParamGroupConfig(pattern=pattern, optimizer_name="AdamW", optimizer_kwargs={"lr": 1.0, "weight_decay": decay})
        for pattern, decay in ((r"bias$|norm", 0.0), (r".*", 0.1))
    ]
    optimizers = MechanicContainer.Config(param_groups=groups).build(model_parts=parts)
    schedulers = LRSchedulersContainer.Config(warmup_steps=10).build(optimizers=optimizers, training_steps=STEPS)
    state = TrainState()
    saving = CheckpointManager.Config(enable=True, interval=100, keep_latest_k=2, last_save_model_only=False)
    manager = CheckpointManager(
        saving, dataloader=None, model_parts=parts, optimizers=optimizers, lr_schedulers=schedulers,
        states={"train_state": state}, sd_adapter=None, base_folder=str(options.output),
    )  # fmt: skip
    if manager.load() and rank == 0:
        print(f"resumed at step {state.step}")

    rows = data()
    while state.step < options.steps:
        chosen = torch.randint(len(rows), (world, BATCH), generator=torch.Generator().manual_seed(state.step))
        tokens = rows[chosen[rank]]
        logits = parts[1](parts[0](tokens[:, :-1]))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizers.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for part in parts for p in part.parameters()], 1.0)
        optimizers.step()
        schedulers.step()
        state.step += 1
        manager.save(state.step, last_step=state.step == options.steps)
        if state.step % 10 == 0 and rank == 0:
            metrics = optimizers.mechanic.metrics()
            print(
                f"step {state.step}: loss {loss.item():.4f}, S {metrics['scale'].item():.3e}, "
                f"lr {metrics['effective_lr/0'].item():.3e}"
            )
    manager.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
