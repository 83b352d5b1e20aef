"""Few bf16 rows times codes, by products of pairs: the numbers of float64, whatever format, group and scales."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_triton import QuantizedWeight
from moe_triton.backends.torch.processor import this_processor
from moe_triton.backends.torch.stored import StoredCodes, stored_codes
from moe_triton.quantization.formats import FORMATS
from tests.helpers.compare import relative_rms

pytest.importorskip("numba")
has_pairs = pytest.mark.skipif(not this_processor().has("avx512_bf16"), reason="the processor multiplies no pairs")
E, OUT, IN = 4, 135, 256
KINDS = [  # format, group, whether it has zero points, the dtype of its scales, columns
    ("mxfp4", 32, False, None, IN), ("nvfp4", 16, False, None, IN), ("int4", 32, True, torch.float16, IN),
    ("int4", 64, False, torch.bfloat16, IN), ("int4", 128, True, torch.float32, IN),
    ("int8", 32, True, torch.float16, 96), ("int8", 64, False, torch.bfloat16, 192),
    ("int8", 128, True, torch.float32, IN), ("int8", 128, False, torch.float32, IN),
    ("fp8", 128, False, None, IN), ("fp8", 128, False, None, 224), ("fp8", 128, False, None, 32),
]  # fmt: skip


def reader_of(weight: QuantizedWeight, dtype: torch.dtype = torch.bfloat16) -> StoredCodes:
    found = stored_codes(weight, dtype)
    assert found is not None
    return found


@has_pairs
@pytest.mark.parametrize(("kind", "group", "has_zeros", "scales", "columns"), KINDS)
def test_products(kind: str, group: int, has_zeros: bool, scales: torch.dtype | None, columns: int) -> None:
    """Every number of rows that a tile has, of experts in any order, one without rows; all codes but NaNs, which have a
    test below; an odd number of outputs, and columns that end within a vector's tile or a group."""
    options: dict[str, Any] = {} if scales is None else {"group": group, "symmetric": not has_zeros}
    weight = QuantizedWeight.quantize(torch.randn(E, OUT, columns), kind, **options)
    weight = weight if scales is None else replace(weight, scales=weight.scales.to(scales))
    every = torch.arange(256, dtype=torch.uint8)
    weight.codes.view(torch.uint8).view(-1)[:256] = every.where(every & 0x7F != 0x7F, 1) if kind == "fp8" else every
    assert (weight.group, weight.zeros is not None) == (group, has_zeros)
    reader, x, bounds = reader_of(weight), torch.randn(11, columns).bfloat16(), [0, 7, 7, 9, 11]
    assert reader.multiplies_pairs(x)
    found, dense = reader.few_rows_in_bf16(x, [2, 3, 0, 1], bounds), weight.dequantize(torch.float64)
    parts = [x[start:stop].double() for start, stop in pairwise(bounds)]

    def by_experts(*order: int) -> Tensor:
        return torch.cat([part @ dense[e].T for part, e in zip(parts, order, strict=True)])

    assert relative_rms(found, by_experts(2, 3, 0, 1)) < 1e-6
    assert relative_rms(found, by_experts(2, 3, 1, 0)) > 0.1
    threads = torch.get_num_threads()
    try:
        for rows in range(1, 8):  # a row's bits depend on it alone
            torch.set_num_threads(1 + rows % 3)
            assert torch.equal(reader.few_rows_in_bf16(x[:rows], [2], [0, rows]), found[:rows])
    finally:
        torch.set_num_threads(threads)


@has_pairs
def test_scales_that_are_nan_or_large() -> None:
    weight = QuantizedWeight.quantize(torch.randn(E, OUT, IN), "mxfp4")
    weight.scales[0, 1, 0], weight.scales[0, 2, 0] = 255, 252
    x = torch.full((3, IN), 2.0**-20).bfloat16()
    found = reader_of(weight).few_rows_in_bf16(x, [0], [0, 3])
    expected = x.double() @ weight.dequantize(torch.float64)[0].T
    assert found.isnan().any(0).nonzero().tolist() == [[1]]
    is_number = ~expected.isnan()
    assert expected[is_number].abs().max() > 2.0**100
    assert relative_rms(found[is_number], expected[is_number]) < 1e-6


@has_pairs
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_codes_that_are_nan(code: int) -> None:
    """They make their own output NaN, and no other; so does a scale, of all outputs of its block."""
    weight = QuantizedWeight.quantize(torch.randn(E, OUT, IN), "fp8")
    weight.codes.view(torch.uint8)[0, 6, 200] = code
    weight.scales[0, 1, 1] = torch.nan
    found = reader_of(weight).few_rows_in_bf16(torch.randn(3, IN).bfloat16(), [0, 1], [0, 2, 3])
    assert found[:2].isnan().all(0).nonzero().flatten().tolist() == [6, *range(128, OUT)]
    assert found.isnan().sum() == 2 * (1 + OUT - 128)


def test_which_rows_go_there() -> None:
    rows, weights = torch.randn(2, IN), torch.randn(E, OUT, IN)
    for kind in FORMATS:
        reader = reader_of(QuantizedWeight.quantize(weights, kind))
        assert reader.multiplies_pairs(rows.bfloat16()) == this_processor().has("avx512_bf16")
        assert not reader_of(QuantizedWeight.quantize(weights, kind), torch.float32).multiplies_pairs(rows)
    ragged = reader_of(QuantizedWeight.quantize(weights[..., :-16], "fp8"))  # half a vector is left
    assert not ragged.multiplies_pairs(rows[:, :-16].bfloat16())
