"""Shared set-up: fresh memory is poisoned with NaN, so that nothing can lean on memory that nobody wrote."""

from __future__ import annotations

import os

if not os.environ.get("MOE_TRITON_TEST_ON_GPU"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is first imported

import pytest
import torch

torch.set_num_threads(1 if os.environ.get("PYTEST_XDIST_WORKER") else 2)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype.is_floating_point:
        return tensor.fill_(float("nan"))
    if tensor.dtype in (torch.int32, torch.int64):
        return tensor.fill_(-(10**9))
    return tensor


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"), (torch, "empty_strided")):
        original = getattr(owner, name)

        def poisoned(*args, _original=original, **kwargs):
            return poison(_original(*args, **kwargs))

        monkeypatch.setattr(owner, name, poisoned)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
