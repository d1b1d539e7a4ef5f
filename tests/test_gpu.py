"""On CUDA: results equal to the CPU's, no host sync in a step, and NCCL on all GPUs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from manic import Mechanic
from support.problems import problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
HERE = Path(__file__).parent
OPTIONS = [
    {},
    {"store_delta": False},
    {"variant": "pytorch"},
    {"variant": "multiplicative"},
    {"update": "snapshot"},
]
# In the other modes the host waits for the step's sums.
NO_WAIT = {"nonfinite": "ignore"}


def train(device: str, dtype: torch.dtype, steps: int = 30, **options: Any) -> tuple[Mechanic, list[torch.Tensor]]:
    cpu_parameters, _ = problem(dtype)
    parameters = [p.detach().to(device).requires_grad_() for p in cpu_parameters]
    optimizer = Mechanic(
        torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.1), s_init=1e-3, **{"variant": "optax", **options}
    )
    for step in range(steps):
        set_gradients(parameters, step)
        optimizer.step()
    return optimizer, parameters


def set_gradients(parameters: list[torch.Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = p.detach() + 0.1 * noise.to(p.device, p.dtype)


@pytest.mark.parametrize(
    "options",
    [{}, {"store_delta": False}, {"variant": "pytorch"}, {"variant": "multiplicative"}, {"update": "snapshot"}],
    ids=str,
)
def test_equals_the_cpu(options: dict[str, Any]) -> None:
    on_cpu, cpu_parameters = train("cpu", torch.float64, **options)
    on_gpu, gpu_parameters = train("cuda", torch.float64, **options)
    assert on_gpu.scale.item() == pytest.approx(on_cpu.scale.item(), rel=1e-9)
    assert on_gpu.scale.device.type == "cuda"
    for a, b in zip(gpu_parameters, cpu_parameters):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"store_delta": False}, {"variant": "pytorch"}, {"variant": "multiplicative"}, {"update": "snapshot"}],
    ids=str,
)
def test_a_step_has_no_host_sync(options: dict[str, Any], dtype: torch.dtype) -> None:
    optimizer, parameters = train("cuda", dtype, steps=2, **options, **NO_WAIT)
    set_gradients(parameters, 3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        optimizer.metrics()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_replays_of_a_captured_step_equal_eager_steps(options: dict[str, Any], fused: bool | None) -> None:
    runs = []
    for capture in (None, gpu.graph_of):
        parameters = [p.detach().float().cuda().requires_grad_() for p in problem()[0]]
        runs.append(gpu.take_steps(parameters, capture, fused=fused, **{"variant": "optax", **options}))
    torch.testing.assert_close(runs[1], runs[0], **gpu.TOLERANCE)


@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_a_step_with_a_host_sync_refuses_capture(mode: str) -> None:
    optimizer, parameters = train("cuda", torch.float32, steps=2, nonfinite=mode)
    set_gradients(parameters, 3)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match='Pass nonfinite="ignore"'), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_detects_a_nonfinite_gradient_on_the_device(options: dict[str, Any]) -> None:
    optimizer, parameters = train("cuda", torch.float32, steps=3, nonfinite="skip", **options)
    before = [p.detach().clone() for p in parameters]
    set_gradients(parameters, 3)
    assert parameters[1].grad is not None
    parameters[1].grad.view(-1)[3] = float("nan")
    optimizer.step()
    assert optimizer.metrics()["nonfinite_steps"] == 1
    for p, x in zip(parameters, before):
        assert torch.equal(p.detach(), x)


def test_follows_a_model_moved_after_construction() -> None:
    results = []
    for moved in (False, True):
        model = torch.nn.Linear(4, 4).double()
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.5)
        if not moved:
            model.cuda()
        optimizer = Mechanic(torch.optim.AdamW(model.parameters(), lr=1.0), s_init=1e-3, variant="optax")
        model.cuda()
        for step in range(10):
            set_gradients(list(model.parameters()), step)
            optimizer.step()
        results.append(optimizer.scale.item())
    assert results[0] == results[1]


def torchrun(*arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*command, str(torch.cuda.device_count()), *arguments], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def test_fsdp2_over_nccl_equals_one_gpu() -> None:
    assert "equal" in torchrun(str(HERE / "support" / "nccl_worker.py"))


@pytest.mark.parametrize("parallel", ["fsdp2", "ddp", "fsdp1"])
def test_train_script_over_nccl(parallel: str, tmp_path: Path) -> None:
    text = torchrun(
        str(HERE.parent / "launch" / "train.py"), "--device", "cuda", "--dtype", "bf16", "--parallel", parallel,
        "--steps", "60", "--checkpoint-dir", str(tmp_path), "--checkpoint-every", "30",
    )  # fmt: skip
    assert "held-out loss" in text
    assert (tmp_path / "step_00000060").is_dir()
