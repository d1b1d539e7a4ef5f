"""Every private name of torch that manic uses is listed here; a torch that has changed one fails a test of its name."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from manic.testing import run

SOURCE = Path(__file__).parents[1] / "src" / "manic"


def scheduled() -> Any:
    base = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    torch.optim.lr_scheduler.ConstantLR(base)
    return base


# Of a module.
MODULES = {
    "torch": ("_foreach_norm", "_foreach_copy_"),
    "torch._utils": ("_flatten_dense_tensors", "_unflatten_dense_tensors"),
    "torch.distributed._shard.sharded_tensor": ("ShardedTensor",),
    "torch.distributed.checkpoint._traverse": ("set_element",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": ("_MEM_FORMAT_ENCODING",),
    "torch.distributed.checkpoint.state_dict": ("_get_fqns", "_init_optim_state"),
    "torch.optim.optimizer": ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"),
    "torch.serialization": ("_get_layout",),
    "torch.utils._python_dispatch": ("TorchDispatchMode",),
}
# Of an optimizer that a scheduler drives.
OPTIMIZER = (
    "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks", "_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks",
    "_zero_grad_profile_name",
)  # fmt: skip
OF_SCHEDULED_STEP = "_wrapped_by_lr_sched"


def of_a_dtensor(name: str) -> None:
    tensor = distribute_tensor(torch.ones(2), init_device_mesh("cpu", (1,)), [Replicate()])
    assert hasattr(tensor, name)


def of_fsdp1() -> None:
    model = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"), use_orig_params=True)
    flat = [p for module in model.modules() for p in module.parameters(recurse=False)]
    assert any(hasattr(p, "_fsdp_flattened") for p in flat)


def of_ddp() -> None:
    assert hasattr(DistributedDataParallel(nn.Linear(2, 2)), "_join_config")


# Of a tensor.
TENSOR = "_version"

# On a process group of one rank: of DTensors, of FSDP1's parameters, of DistributedDataParallel.
DTENSOR, FSDP1, DDP = ("_spec", "_local_tensor"), "_fsdp_flattened", "_join_config"

LISTED = {
    *(part for module, names in MODULES.items() for part in (*module.split("."), *names)),
    *OPTIMIZER, OF_SCHEDULED_STEP, TENSOR, *DTENSOR, FSDP1, DDP,
}  # fmt: skip

# Private names that are not torch's: the key of mechanic-pytorch's state, Python's frames, the start of names above.
OTHERS = {"_mechanic", "_getframe", "_optimizer_"}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in MODULES.items() for name in names])
def test_torch_has_the_name(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", OPTIMIZER)
def test_optimizers_have_the_name(name: str) -> None:
    assert hasattr(scheduled(), name)


def test_a_scheduler_marks_the_step_that_it_replaces() -> None:
    assert hasattr(scheduled().step, OF_SCHEDULED_STEP)


def test_tensors_count_what_is_written_to_them() -> None:
    tensor = torch.zeros(1)
    before = getattr(tensor, TENSOR)
    tensor.add_(1)
    assert getattr(tensor, TENSOR) > before


@pytest.mark.parametrize("name", DTENSOR)
def test_dtensors_have_the_name(name: str) -> None:
    run(of_a_dtensor, 1, name)


def test_fsdp1_marks_its_parameters() -> None:
    run(of_fsdp1, 1)


def test_ddp_tells_of_join() -> None:
    run(of_ddp, 1)


def _used(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            yield from (part for part in str(node.module).split("."))
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, (ast.AnnAssign,)) and isinstance(node.target, ast.Name):
            yield node.target.id


def test_no_other_is_used() -> None:
    trees = [ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")]
    defined = {name for tree in trees for name in _defined(tree)}
    private = re.compile(r"_[A-Za-z]\w*")
    used = {name for tree in trees for name in _used(tree) if private.fullmatch(name)} - defined
    assert used - LISTED - OTHERS == set()


@pytest.mark.parametrize("name", sorted(LISTED - {part for module in MODULES for part in module.split(".")}))
def test_each_is_used(name: str) -> None:
    assert re.search(rf"\b{name}\b", "".join(path.read_text() for path in SOURCE.rglob("*.py")))
