"""Layout and local tensors, mostly on one process."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from manic.distributed.layout import Layout, is_fsdp1, local, local_gradient, local_storage
from manic.optimizer.kinds import resolve_update
from manic.testing import ranks


def test_one_process_holds_every_element_once() -> None:
    layout = Layout(None, "replicated", 1)
    assert layout.group is None
    assert layout.replicas(torch.ones(3)) == 1


def test_local_shares_storage_and_has_no_history() -> None:
    parameter = nn.Parameter(torch.ones(3))
    with torch.no_grad():
        view = local(parameter)
    assert view.data_ptr() == parameter.data_ptr()
    assert not view.requires_grad
    assert local_gradient(parameter) is None


def test_torch_has_the_attribute_of_fsdp1_parameters() -> None:
    from torch.distributed.fsdp._common_utils import FSDP_FLATTENED

    parameter = nn.Parameter(torch.ones(3))
    assert not is_fsdp1(parameter)
    setattr(parameter, FSDP_FLATTENED, True)
    assert is_fsdp1(parameter)


def test_only_known_optimizers_step_in_displacement_space() -> None:
    parameter = [torch.ones(2, 2, requires_grad=True)]
    assert resolve_update(torch.optim.AdamW(parameter), "auto") == "decoupled"
    assert resolve_update(torch.optim.SGD(parameter), "auto") == "coupled"
    assert resolve_update(torch.optim.Adafactor(parameter), "auto") == "snapshot"
    assert resolve_update(torch.optim.ASGD(parameter), "auto") == "snapshot"
    assert resolve_update(type("AdamW", (torch.optim.AdamW,), {})(parameter), "auto") == "snapshot"
    assert resolve_update(torch.optim.AdamW(parameter), "snapshot") == "snapshot"


@ranks(2)
def test_local_storage_is_one_object_and_equals_local() -> None:
    parameter = nn.Parameter(distribute_tensor(torch.arange(6.0), init_device_mesh("cpu", (2,)), [Shard(0)]))
    storage = local_storage(parameter)
    assert storage is local_storage(parameter)
    with torch.no_grad():
        assert local(parameter).data_ptr() == storage.data_ptr()
        assert torch.equal(local(parameter), storage)
    plain = torch.ones(2)
    assert local_storage(plain) is plain
