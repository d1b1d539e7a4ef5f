"""Started by torchrun on every GPU: FSDP2 over NCCL and one GPU learn the same scale."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))
from manic import Mechanic
from support.layouts import batch, make_base, make_net


def main() -> None:
    """Train twice, and compare."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    scales = []
    for sharded in (False, True):
        model = make_net().to(device)
        if sharded:
            fully_shard(model)
        group = None if sharded else alone
        optimizer = Mechanic(make_base("adamw", model.parameters()), s_init=1e-3, process_group=group, variant="optax")
        for step in range(20):
            x, y = (tensor.to(device) for tensor in batch(step, torch.float64))
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        scales.append(optimizer.scale.item())
    assert abs(scales[0] - scales[1]) <= 1e-10 * scales[0], scales
    print("equal", scales)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
