"""A small float64 run with Accelerate on ranks, and the same run in one process without it."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import manic
from manic.integrations.deepspeed import whole_model_steps
from support.deepspeed_runs import begin

STEPS, BATCH = 12, 6


def be_torchrun() -> None:
    """Set what torchrun sets, by which frameworks see that there are ranks."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(
        RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",
    )  # fmt: skip


def make(lora: bool, seed: int = 0) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A model and its param groups: weights and biases, or the A and the B of LoRA."""
    torch.manual_seed(seed)
    model: Any = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)).double()
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"]))
    names = ("lora_A", "lora_B") if lora else ("weight", "bias")
    parts = [[p for name, p in model.named_parameters() if of in name and p.requires_grad] for of in names]
    return model, [{"params": parts[0], "weight_decay": 0.1}, {"params": parts[1], "weight_decay": 0.0}]


def batch(step: int, world: int) -> tuple[Tensor, Tensor]:
    """The batch of all ranks."""
    x = torch.randn(BATCH * world, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x, x[:, :8].sin()


def alone(world: int, lora: bool = False, **options: Any) -> list[list[float]]:
    """S after each step of a run in one process, on the batches of ``world`` ranks."""
    model, groups = make(lora)
    mine = [dist.new_group([each]) for each in range(dist.get_world_size())][dist.get_rank()]
    optimizer = manic.Mechanic(torch.optim.AdamW(groups, lr=1.0), process_group=mine, **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    scales = []
    for step in range(STEPS):
        x, y = batch(step, world)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 0.5)
        optimizer.step()
        scheduler.step()
        scales.append(optimizer.scale.reshape(-1).tolist())
    return scales


def zero_plugin(stage: int) -> Any:
    from accelerate import DeepSpeedPlugin

    config = {
        "train_micro_batch_size_per_gpu": BATCH, "gradient_clipping": 0.5, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }  # fmt: skip
    return DeepSpeedPlugin(hf_ds_config=config)


class Accelerated:
    """The same with Accelerate; it can be saved and loaded. With ZeRO in float32."""

    def __init__(self, layout: str, seed: int = 0, lora: bool = False, split: int = 1, **options: Any) -> None:
        from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
        from accelerate.state import AcceleratorState
        from accelerate.utils import GradientAccumulationPlugin

        is_zero = layout.startswith("ZeRO")
        if is_zero:
            begin()
            PartialState(cpu=True)  # Accelerator(cpu=True) would take no notice of DeepSpeed
            AcceleratorState._reset_state()  # a second Accelerator of a process may not have a plugin
        self.accelerator = Accelerator(
            step_scheduler_with_optimizer=False,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=split, sync_with_dataloader=False),
            **({"deepspeed_plugin": zero_plugin(int(layout[-1]))} if is_zero else {"cpu": True}),
        )
        if layout == "FSDP2":  # Accelerate shards on accelerators only; this is what it does for one
            PartialState().distributed_type = self.accelerator.state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="no_wrap", state_dict_type="SHARDED_STATE_DICT"
            )
        model, groups = make(lora, seed)
        if is_zero:
            model.float()
            options = {"plain": "sharded", **options}
        base = manic.AdamW(groups, lr=1.0, **options)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(base, T_max=STEPS)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, base, schedule)
        if is_zero:
            whole_model_steps(self.model)
        self.split = split
        assert all(isinstance(p, DTensor) == (layout == "FSDP2") for p in self.model.parameters())
        assert isinstance(self.model, DistributedDataParallel) == (layout == "DDP")

    def train(self, steps: range) -> list[list[float]]:
        """Take steps; S after each."""
        rank, world, scales = self.accelerator.process_index, self.accelerator.num_processes, []
        for step in steps:
            share = slice(rank * BATCH, (rank + 1) * BATCH)
            x, y = (each[share].to(next(self.model.parameters()).dtype) for each in batch(step, world))
            for part in torch.arange(BATCH).chunk(self.split):
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward((self.model(x[part]) - y[part]).square().mean())
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            self.scheduler.step()
            scales.append(manic.unwrap(self.optimizer).scale.reshape(-1).tolist())
        return scales

    def parameters(self) -> list[Tensor]:
        """This rank's."""
        return [getattr(p, "to_local", lambda p=p: p)().detach().clone() for p in self.model.parameters()]


def resume(folder: str, layout: str, **options: Any) -> None:
    """Save in the middle; what is loaded from there must end where the run ends that was not stopped."""
    be_torchrun()
    whole = Accelerated(layout, **options)
    whole.train(range(STEPS // 2))
    whole.accelerator.save_state(folder)
    scales = whole.train(range(STEPS // 2, STEPS))
    resumed = Accelerated(layout, seed=1, **options)
    resumed.accelerator.load_state(folder)
    assert resumed.train(range(STEPS // 2, STEPS)) == scales
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
