"""Colossal-AI's comparisons of tensors, on one rank and over a group."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor


def assert_equal(a: Tensor, b: Tensor) -> None:
    """Raise AssertionError unless all elements are equal."""
    assert torch.equal(a, b), f"wanted equal tensors, got {a} and {b}"


def assert_not_equal(a: Tensor, b: Tensor) -> None:
    """Raise AssertionError if all elements are equal."""
    assert not torch.equal(a, b), f"wanted different tensors, got {a} twice"


def assert_close(a: Tensor, b: Tensor, rtol: float = 1e-5, atol: float = 1e-8) -> None:
    """Raise AssertionError unless |a - b| <= atol + rtol * |b| everywhere (`torch.allclose`)."""
    assert torch.allclose(a, b, rtol=rtol, atol=atol), f"wanted close tensors, got {a} and {b}"


def assert_close_loose(a: Tensor, b: Tensor, rtol: float = 1e-3, atol: float = 1e-3) -> None:
    """Call `assert_close` with wide tolerances."""
    assert_close(a, b, rtol, atol)


def assert_equal_in_group(tensor: Tensor, process_group: dist.ProcessGroup | None = None) -> None:
    """Raise AssertionError unless the tensor is the same on all ranks of the group; every one of them calls it."""
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(found, tensor.contiguous(), group=process_group)
    for rank, (one, other) in enumerate(pairwise(found)):
        assert torch.equal(one, other), f"wanted equal tensors, got {one} on rank {rank} and {other} on rank {rank + 1}"
