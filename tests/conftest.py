"""Shared set-up: fresh memory is poisoned with NaN, so that nothing can lean on memory that nobody wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator

if not os.environ.get("MOE_TRITON_TEST_ON_GPU"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is first imported

import pytest
import torch
from poison import poisoned
from ranks import four_ranks, two_ranks

__all__ = ["four_ranks", "two_ranks"]

torch.set_num_threads(1 if os.environ.get("PYTEST_XDIST_WORKER") else 2)


@pytest.fixture(autouse=True)
def poisoned_empty() -> Iterator[None]:
    with poisoned():
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
