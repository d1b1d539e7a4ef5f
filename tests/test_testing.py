"""manic.testing: results, failures, timeouts and reuse of processes."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from manic.testing import RankError, ranks, run


def reduce(value: float) -> tuple[int, float]:
    tensor = torch.tensor(value)
    dist.all_reduce(tensor)
    return dist.get_rank(), tensor.item()


def fail_on_rank_one() -> None:
    print(f"output of rank {dist.get_rank()}")
    if dist.get_rank() == 1:
        raise ValueError("the reason")
    dist.barrier()


def hang_on_rank_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)
    dist.barrier()


def die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os._exit(7)


def process_id() -> int:
    return os.getpid()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_returns_results_by_rank(world_size: int) -> None:
    assert run(reduce, world_size, 1.5) == [(rank, 1.5 * world_size) for rank in range(world_size)]


@ranks(2)
@pytest.mark.parametrize("value", [3])
def test_decorator_passes_parameters(value: int) -> None:
    assert value == 3
    assert dist.get_world_size() == 2


@ranks(1)
@torch.no_grad()
def test_decorator_keeps_other_decorators() -> None:
    assert not torch.is_grad_enabled()


@ranks(2)
def test_a_skip_on_a_rank_skips_the_test() -> None:
    if dist.get_rank() == 1:
        pytest.skip("skipped on rank 1")


def test_reuses_processes() -> None:
    first = run(process_id, 2)
    start = time.monotonic()
    second = run(process_id, 2)
    assert first == second
    assert time.monotonic() - start < 30.0  # takes 0.05 s; new processes take seconds


def test_reports_a_failing_ranks_traceback_and_output() -> None:
    with pytest.raises(RankError) as caught:
        run(fail_on_rank_one, 2)
    text = str(caught.value)
    assert "rank 1: Traceback" in text
    assert "ValueError: the reason" in text
    assert "output of rank 1" in text
    assert run(process_id, 2)


def test_kills_a_hanging_rank_and_reports_its_stack() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="hang_on_rank_one"):
        run(hang_on_rank_one, 2, timeout=2.0)
    assert time.monotonic() - start < 60.0
    assert run(reduce, 2, 1.0)[0] == (0, 2.0)


def test_reports_a_dead_rank() -> None:
    with pytest.raises(RankError, match=r"rank 1: died \(exit code 7\)"):
        run(die_on_rank_one, 2)
    assert run(reduce, 2, 1.0)[0] == (0, 2.0)


def test_a_call_that_is_interrupted_leaves_no_answer_to_the_next() -> None:
    """As by a test's timeout, which raises in the middle of a call."""

    def interrupt(*_: object) -> None:
        raise TimeoutError("the test took too long")

    assert run(reduce, 2, 1.0)[0] == (0, 2.0)
    before = signal.signal(signal.SIGALRM, interrupt)
    remaining, _ = signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(TimeoutError):
            run(time.sleep, 2, 1.5)
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, remaining)  # pytest-timeout's own
    for value in (1.0, 2.0):
        assert run(reduce, 2, value)[0] == (0, 2 * value)


def test_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="top level of a module"):
        run(lambda: None, 2)
    with pytest.raises(ValueError, match="world_size must be positive"):
        run(reduce, 0)
