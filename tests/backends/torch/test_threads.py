"""Loops that several threads share."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch

from moe_triton.backends.torch.threads import share


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("size", "least", "count"), [(7, 1, 3), (7, 3, 2), (7, 8, 1), (2, 1, 2), (0, 1, 1), (5, 0, 3)])
@pytest.mark.usefixtures("three_threads")
def test_every_index_once(size: int, least: int, count: int) -> None:
    ranges, lock = [], threading.Lock()

    def run(first: int, last: int) -> None:
        with lock:
            ranges.append(range(first, last))

    share(run, size, least)
    assert sorted(index for found in ranges for index in found) == list(range(size))
    assert len(ranges) == count


@pytest.mark.parametrize("failing", [0, 6])
@pytest.mark.usefixtures("three_threads")
def test_an_error_in_any_thread_is_raised_when_all_have_ended(failing: int) -> None:
    ended = []

    def run(first: int, last: int) -> None:
        ended.append(first)
        if failing in range(first, last):
            raise ValueError(f"row {failing}")

    with pytest.raises(ValueError, match=f"row {failing}"):
        share(run, 7, 1)
    assert len(ended) == 3


def shared_sum(size: int) -> int:
    torch.set_num_threads(2)
    found = [0] * size
    share(lambda first, last: found.__setitem__(slice(first, last), range(first, last)), size, 1)
    return sum(found)


def test_a_forked_process_starts_threads_of_its_own() -> None:
    assert shared_sum(10) == 45
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(shared_sum, (10,)).get(timeout=60) == 45
