"""Shared set-up: fresh memory is poisoned with NaN, so that nothing can lean on memory that nobody wrote."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

if not os.environ.get("MOE_TRITON_TEST_ON_GPU"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is first imported

import pytest
import torch

from tests.helpers.poison import poisoned
from tests.helpers.ranks import four_ranks, two_ranks

__all__ = ["four_ranks", "two_ranks"]

torch.set_num_threads(1 if os.environ.get("PYTEST_XDIST_WORKER") else 2)


@pytest.fixture(autouse=True)
def poisoned_empty() -> Iterator[None]:
    with poisoned():
        yield


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    """One that a test makes in this very process, as DeepSpeed's layer needs, must not be there for the next test."""
    yield
    if not torch.distributed.is_initialized():
        return
    torch.distributed.destroy_process_group()
    if comm := sys.modules.get("deepspeed.comm.comm"):
        comm.cdb = None
    if groups := sys.modules.get("deepspeed.utils.groups"):
        for name, value in vars(groups).items():
            if name.startswith("_") and name.isupper() and isinstance(value, dict):
                value.clear()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
