"""A pass over many tensors visits every element once, for all sizes and strides, and changes nothing else."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import Tensor

from manic import Mechanic
from manic.step import chunks
from manic.step.chunks import batched, pieces

SHAPES: list[tuple[int, ...]] = [
    (), (0,), (1,), (7, 3), (3, 5, 2), (1 << 14,), ((1 << 14) + 1,), (300, 1000), (1 << 20,), ((1 << 20) + 1,),
]  # fmt: skip


def tensors(dtype: torch.dtype, transposed: bool, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in SHAPES:
        tensor = torch.randn(shape[::-1] if transposed else shape, generator=generator).to(dtype)
        made.append(tensor.permute(tuple(reversed(range(tensor.ndim)))) if transposed else tensor)
    return made


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_visits_corresponding_elements_once(dtype: torch.dtype, transposed: bool) -> None:
    changed, read = tensors(dtype, transposed), tensors(dtype, False, seed=1)
    before = [(a.clone(), b.clone()) for a, b in zip(changed, read)]
    rows = batched(zip(changed, read), size_of=lambda row: row[0].numel(), kind_of=lambda row: None)
    assert sorted(id(a) for batch in rows for a, _ in batch) == sorted(map(id, changed))
    for batch in rows:
        a_column, b_column = zip(*batch)
        for a, b, nothing in pieces(a_column, b_column, [None] * len(batch), written=(0, 2)):
            assert nothing is None
            assert a.shape == b.shape
            a += b
            b += 0
    for a, b, (old_a, old_b) in zip(changed, read, before):
        assert torch.equal(a, old_a + old_b)
        assert torch.equal(b, old_b)


def test_batches_have_one_kind_and_dtype_and_bounded_size() -> None:
    items = [(torch.zeros(size, dtype=dtype), kind) for size in (1, 10, 9_999, 1 << 14, 1 << 15) for kind in "ab"
             for dtype in (torch.float32, torch.bfloat16) for _ in range(50)]  # fmt: skip
    batches = batched(items, size_of=lambda item: item[0].numel(), kind_of=lambda item: (item[0].dtype, item[1]))
    for batch in batches:
        assert len({(tensor.dtype, kind) for tensor, kind in batch}) == 1
        assert len(batch) == 1 or sum(tensor.numel() for tensor, _ in batch) <= chunks._BATCH
    assert sum(map(len, batches)) == len(items)
    assert len(batches) < 300


def test_written_columns_that_lie_side_by_side_are_copies_unless_in_place() -> None:
    flat = torch.zeros(5)
    column = list(torch.split(flat, [3, 2]))
    (alone,) = next(pieces(column))
    assert alone.data_ptr() == flat.data_ptr()
    (copied,) = next(pieces(column, written=(0,)))
    assert copied.data_ptr() != flat.data_ptr()
    for (piece,) in pieces(column, written=(0,), in_place=True):
        piece += 1
    for (piece,) in pieces(column, written=(0,)):
        piece += 1
    assert flat.tolist() == [2.0] * 5


def test_an_interrupted_pass_does_not_write_its_chunk() -> None:
    small = [torch.ones(3), torch.ones(2)]
    walk = pieces(small, written=(0,))
    (piece,) = next(walk)
    piece.zero_()
    assert isinstance(walk, Generator)
    walk.close()  # as an exception in a for loop does
    assert all((tensor == 1).all() for tensor in small)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [
    {}, {"store_delta": False}, {"update": "snapshot"}, {"variant": "pytorch"}, {"update": "decoupled"},
    {"variant": "multiplicative"},
], ids=str)  # fmt: skip
def test_batched_and_single_passes_are_equal(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of small parameters equal single ones, and pieces equal whole tensors."""
    runs = []
    for small, piece in ((1 << 14, 1 << 20), (-1, 1 << 40), (100, 1000)):
        monkeypatch.setattr(chunks, "SMALL", small)
        monkeypatch.setattr(chunks, "CPU_PIECE", piece)
        shapes = [(3,), (), (4, 5), (40, 50), (0,), (128, 64), (7,)]
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
        parameters.append(torch.randn(6, 9, generator=generator).to(dtype).t().requires_grad_())
        groups: list[dict[str, Any]] = [
            {"params": parameters[:4]},
            {"params": parameters[4:], "weight_decay": 0.0, "lr": 0.5},
        ]
        optimizer = Mechanic(
            torch.optim.AdamW(groups, lr=1.0, weight_decay=0.1), s_init=1e-3, **{"variant": "optax", **options}
        )
        for step in range(6):
            for index, parameter in enumerate(parameters):
                gradient = torch.randn(parameter.shape, generator=generator).to(dtype)
                parameter.grad = None if (index + step) % 5 == 0 else gradient
            optimizer.step()
        runs.append((optimizer.scale, [parameter.detach().clone() for parameter in parameters]))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]
    of_scale = max(tolerance, 1e-12 if dtype == torch.float64 else 1e-4)
    for scale, found in runs[1:]:
        torch.testing.assert_close(scale, runs[0][0], rtol=of_scale, atol=0)
        for a, b in zip(found, runs[0][1]):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
