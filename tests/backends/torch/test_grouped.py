"""The grouped product: where torch's own may compute it, and its three ways against one product per expert."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_triton.backends.torch import grouped
from moe_triton.backends.torch.grouped import GroupedRows, can_group, grouped_outer, grouped_product, sum_per_expert
from tests.helpers.compare import assert_close


class OnGpu:
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True
    device = torch.device("cuda:0")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)


def bf16(*shape: int, strides: tuple[int, ...] | None = None, start: int = 0) -> Tensor:
    memory = torch.zeros(start + 4096, dtype=torch.bfloat16)
    return memory.as_strided(shape, strides or torch.empty(shape, device="meta").stride(), start)


ROWS, WEIGHT = bf16(5, 16), bf16(3, 16, 24)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "_has_grouped_kernel", lambda device: True)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        (ROWS, WEIGHT, True),
        (ROWS, bf16(3, 24, 16).mT, True),
        (ROWS, bf16(5, 8), True),
        (ROWS.half(), WEIGHT.half(), False),
        (ROWS, WEIGHT.float(), False),
        (bf16(0, 16), WEIGHT, False),
        (bf16(5, 12), bf16(3, 12, 24), False),
        (ROWS, bf16(3, 16, 20), False),
        (bf16(5, 16, strides=(24, 1)), WEIGHT, True),
        (bf16(5, 16, strides=(20, 1)), WEIGHT, False),
        (bf16(5, 16, strides=(8, 1)), WEIGHT, False),
        (bf16(5, 16, strides=(32, 2)), WEIGHT, False),
        (bf16(5, 16, strides=(1, 5)), WEIGHT, False),
        (bf16(8, 16, strides=(1, 8)), WEIGHT, True),
        (bf16(5, 16, start=4), WEIGHT, False),
        (ROWS, bf16(3, 16, 24, strides=(400, 24, 1)), True),
        (ROWS, bf16(3, 16, 24, strides=(385, 24, 1)), False),
        (ROWS, bf16(3, 16, 24, start=1), False),
    ],
)
def test_what_grouped_mm_takes(left: Tensor, right: Tensor, expected: bool) -> None:
    assert can_group(OnGpu(left), OnGpu(right)) is expected
    assert not can_group(left, right)


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 4, 8, 16, 24]), min_size=3, max_size=3),
    left=st.tuples(st.integers(1, 32), st.sampled_from([1, 2])),
    right=st.tuples(st.integers(1, 32), st.sampled_from([1, 2])),
    transposed=st.tuples(st.booleans(), st.booleans()),
)
def test_grouped_mm_refuses_nothing_that_we_give_it(
    sizes: list[int], left: tuple[int, int], right: tuple[int, int], transposed: tuple[bool, bool]
) -> None:
    s, i, o = sizes
    x = bf16(s, i, strides=left[::-1] if transposed[0] else left)
    weight = bf16(2, i, o, strides=(800, *(right[::-1] if transposed[1] else right)))
    if grouped._is_aligned(x) and grouped._is_aligned(weight):
        F.grouped_mm(x, weight, offs=torch.tensor([s // 2, s], dtype=torch.int32))


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [
        ((8, 0), None, False),
        ((8, 9), None, False),
        ((9, 0), None, True),
        ((10, 3), None, True),
        ((12, 0), None, False),
        ((9, 4), "6.4", False),
    ],
)
def test_which_gpus_have_the_kernel(
    capability: tuple[int, int], hip: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert grouped._has_grouped_kernel.__wrapped__(torch.device("cuda:0")) is expected


@pytest.mark.parametrize("way", ["grouped_mm", "one by one", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ways_agree(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "can_group", lambda left, right: way == "grouped_mm")
    bounds = [0, 3, 3, 8]  # an idle expert, and two rows past the end, which are NaN
    x, y, weight = torch.randn(10, 16).to(dtype), torch.randn(10, 8).to(dtype), torch.randn(3, 16, 8).to(dtype)
    x[8:] = y[8:] = float("nan")
    rows = GroupedRows(torch.tensor(bounds, dtype=torch.int32), 10)
    monkeypatch.setattr(GroupedRows, "are_readable", way == "one by one")
    parts = [slice(start, end) for start, end in pairwise(bounds)]
    wide = [t.double() for t in (x, y, weight)]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    product = torch.cat([wide[0][part] @ wide[2][e] for e, part in enumerate(parts)])
    assert_close(grouped_product(x, weight, rows)[:8], product, tolerance=tolerance)
    outer = torch.stack([wide[0][part].T @ wide[1][part] for part in parts])
    assert_close(grouped_outer(x, y, rows), outer, tolerance=tolerance)
    sums = torch.stack([wide[1][part].sum(0) for part in parts])
    found = sum_per_expert(y, rows)
    assert found.is_contiguous()
    assert_close(found, sums, tolerance=tolerance)
