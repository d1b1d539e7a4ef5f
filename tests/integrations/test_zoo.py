"""All optimizers of a package: each is right, refused with words, or fails without Mechanic, too; as the docs say."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from manic.testing import shutdown
from support import zoo

PARTS = [0, 1, 2]
"""Of a package, for workers to share."""


@pytest.fixture(autouse=True, scope="module")
def _end_processes() -> Iterator[None]:
    """The packages change global state of the processes that walk through them."""
    yield
    shutdown()


def check(package: str, part: int) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    found = zoo.verdicts(package, part, len(PARTS))
    assert found
    assert not {name: verdict.reason for name, verdict in found.items() if verdict.outcome == zoo.WRONG}
    documented = zoo.verdicts_in_docs(package)
    if documented is None:
        return  # the docs have another version of the package
    assert {name: documented.get(name) for name in found} == {name: zoo.label(each) for name, each in found.items()}
    if part == 0:
        assert documented.keys() == zoo.names(package)


@pytest.mark.framework("pytorch_optimizer", "all its optimizers are sorted: none is silently wrong")
@pytest.mark.parametrize("part", PARTS)
def test_pytorch_optimizer(part: int) -> None:
    check("pytorch_optimizer", part)


@pytest.mark.framework("timm", "all its optimizers are sorted: none is silently wrong")
@pytest.mark.parametrize("part", PARTS)
def test_timm(part: int) -> None:
    check("timm", part)


@pytest.mark.framework("torchao", "all its optimizers are sorted: none is silently wrong")
@pytest.mark.parametrize("part", PARTS)
def test_torchao(part: int) -> None:
    check("torchao", part)


@pytest.mark.framework("bitsandbytes", "all its optimizers are sorted, on a CPU: none is silently wrong")
@pytest.mark.parametrize("part", PARTS)
def test_bitsandbytes(part: int) -> None:
    check("bitsandbytes", part)


@pytest.mark.framework("heavyball", "all its optimizers are sorted: none is silently wrong")
@pytest.mark.parametrize("part", PARTS)
def test_heavyball(part: int) -> None:
    check("heavyball", part)
