"""The memory that large CPU tensors use again."""

from __future__ import annotations

from collections import defaultdict, deque

import pytest
import torch

from moe_triton.backends.torch import memory


def test_memory_is_used_again_once_nothing_lies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_idle", defaultdict(deque))
    first = memory.empty((3, 500_000), torch.float32)
    address, part = first.data_ptr(), first[1:]
    del first
    second = memory.empty((3, 500_000), torch.float32)
    assert second.data_ptr() != address  # a view is still there
    del part
    third = memory.empty((1_490_000,), torch.float32)  # of the same class of sizes
    assert third.data_ptr() == address
    monkeypatch.setattr(memory, "MOST_IDLE", 0)
    del second, third
    assert not any(memory._idle.values())


def test_the_environment_turns_the_memory_pool_off(monkeypatch: pytest.MonkeyPatch) -> None:
    idle: defaultdict[int, deque] = defaultdict(deque)
    monkeypatch.setattr(memory, "_idle", idle)
    for value, kept in (("0", 0), ("1", 1)):
        monkeypatch.setenv("MOE_TRITON_MEMORY_POOL", value)
        large = memory.empty((3, 500_000), torch.float32)
        # a buffer of the pool is up to an eighth larger than its tensor
        assert (large.untyped_storage().nbytes() == large.nbytes) == (value == "0")
        del large
        assert sum(map(len, idle.values())) == kept
    monkeypatch.setenv("MOE_TRITON_MEMORY_POOL", "off")
    with pytest.raises(ValueError, match="MOE_TRITON_MEMORY_POOL: got 'off', wanted one of 0, 1"):
        memory.empty((3, 500_000), torch.float32)


@pytest.mark.parametrize(("pages", "kept"), [(1 << 20, 1 << 30), (1 << 24, 8 << 30), (None, 1 << 30)])
def test_how_much_idle_memory_is_kept(monkeypatch: pytest.MonkeyPatch, pages: int | None, kept: int) -> None:
    def sysconf(name: str) -> int:
        if pages is None:
            raise ValueError(name)
        return {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": pages}[name]

    monkeypatch.setattr(memory.os, "sysconf", sysconf)
    assert memory.most_idle() == kept


@pytest.mark.parametrize("size", [1, 17, 4 << 20, (4 << 20) + 1, 123_456_789])
def test_size_classes(size: int) -> None:
    assert size <= memory.size_class(size) <= size * 9 / 8 + 1
    assert memory.size_class(memory.size_class(size)) == memory.size_class(size)


@pytest.mark.parametrize("shape", [(0, 3), (5,), (1 << 20, 2), (3, 700_001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_is_aligned_contiguous_and_writable(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = memory.empty(shape, dtype)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % memory.ALIGNMENT == 0
    assert torch.equal(tensor.fill_(2), torch.full(shape, 2, dtype=dtype))
