"""Fresh memory full of NaN, so that nothing can lean on memory that nobody wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


def poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype.is_floating_point:
        tensor.detach().fill_(float("nan"))  # a parameter too: torch 2.11 makes one while it checkpoints
    if tensor.dtype in (torch.int32, torch.int64):
        return tensor.fill_(-(10**9))
    return tensor


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uninitialised is full of NaN, and of large negative integers."""
    with torch.device("cpu"):
        torch.empty(0)  # torch.device as a context lists the functions that it affects at its first use: the real ones
    with pytest.MonkeyPatch.context() as patch:
        owners = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"), (torch, "empty_strided"))
        for owner, name in owners:
            original = getattr(owner, name)

            def filled(*args, _original=original, **kwargs):
                return poison(_original(*args, **kwargs))

            patch.setattr(owner, name, filled)
        yield
