"""DeepSpeed's ZeRO and manic: train a small transformer on bytes, save, and resume.

    torchrun --nproc-per-node 2 launch/examples/deepspeed_zero.py --output runs/deepspeed --steps 100
    torchrun --nproc-per-node 2 launch/examples/deepspeed_zero.py --output runs/deepspeed  # goes on from step 100

Without a GPU, set DS_ACCELERATOR=cpu.
"""

import argparse
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from manic import Mechanic
from manic.integrations.deepspeed import whole_model_steps

STEPS = 200  # the length of the schedule
BATCH, LENGTH, WIDTH = 8, 64, 64


class Model(nn.Module):
    """Predicts the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        block = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.position.weight
        return self.head(self.blocks(x, mask=self.mask, is_causal=True))


def data() -> torch.Tensor:
    """The source of this Python's argparse and others, cut into sequences; no download."""
    text = b"".join(file.read_bytes() for file in sorted(Path(argparse.__file__).parent.glob("*.py")))
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)


def config(stage: int) -> dict[str, Any]:
    """DeepSpeed's."""
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,  # ZeRO knows no optimizer but DeepSpeed's and torch's Adam
        "steps_per_print": None,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"stop after so many; the schedule is for {STEPS}")
    parser.add_argument("--stage", type=int, default=2, help="of ZeRO, 0 to 3")
    options = parser.parse_args()

    deepspeed.init_distributed()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    model = Model()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = Mechanic(torch.optim.AdamW(groups, lr=1.0), plain="sharded")
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config(options.stage)
    )
    whole_model_steps(engine)  # one scale for both groups

    checkpoints = options.output / "checkpoints"
    if checkpoints.exists():
        engine.load_checkpoint(checkpoints)
        if rank == 0:
            print(f"resumed at step {engine.global_steps}")

    rows = data()
    while engine.global_steps < options.steps:
        chosen = torch.randint(len(rows), (world, BATCH), generator=torch.Generator().manual_seed(engine.global_steps))
        tokens = rows[chosen[rank]].to(engine.device)
        loss = nn.functional.cross_entropy(engine(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        if engine.global_steps % 10 == 0 and rank == 0:
            metrics = optimizer.metrics()
            print(
                f"step {engine.global_steps}: loss {loss.item():.4f}, S {metrics['scale'].item():.3e}, "
                f"lr {metrics['effective_lr/0'].item():.3e}, gradient norm {float(engine.get_global_grad_norm()):.3f}"
            )
    engine.save_checkpoint(checkpoints)
    engine.destroy()
    dist.barrier()  # a collective that gloo is still cleaning up would abort the exit
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
