"""Few bf16 rows times codes of four bits, by products of pairs: the numbers of float64, whatever group and scales."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_triton import QuantizedWeight
from moe_triton.backends.torch.processor import this_processor
from moe_triton.backends.torch.stored import StoredCodes, stored_codes
from tests.helpers.compare import relative_rms

pytest.importorskip("numba")
has_pairs = pytest.mark.skipif(not this_processor().has("avx512_bf16"), reason="the processor multiplies no pairs")
E, OUT, IN = 3, 135, 256
KINDS = [  # format, group, whether it has zero points, the dtype of its scales
    ("mxfp4", 32, False, None), ("nvfp4", 16, False, None), ("int4", 32, True, torch.float16),
    ("int4", 64, False, torch.bfloat16), ("int4", 128, True, torch.float32),
]  # fmt: skip


def reader_of(weight: QuantizedWeight, dtype: torch.dtype = torch.bfloat16) -> StoredCodes:
    found = stored_codes(weight, dtype)
    assert found is not None
    return found


@has_pairs
@pytest.mark.parametrize(("kind", "group", "has_zeros", "scales"), KINDS)
def test_products(kind: str, group: int, has_zeros: bool, scales: torch.dtype | None) -> None:
    """Every number of rows that a tile has, of experts in any order; all codes, and an odd number of outputs."""
    options: dict[str, Any] = {} if scales is None else {"group": group, "symmetric": not has_zeros}
    weight = QuantizedWeight.quantize(torch.randn(E, OUT, IN), kind, **options)
    weight = weight if scales is None else replace(weight, scales=weight.scales.to(scales))
    weight.codes.view(torch.uint8).view(-1)[:256] = torch.arange(256, dtype=torch.uint8)
    assert (weight.group, weight.zeros is not None) == (group, has_zeros)
    reader, x, bounds = reader_of(weight), torch.randn(11, IN).bfloat16(), [0, 7, 9, 11]
    assert reader.multiplies_pairs(x)
    found, dense = reader.few_rows_in_bf16(x, [2, 0, 1], bounds), weight.dequantize(torch.float64)
    parts = [x[bounds[i] : bounds[i + 1]].double() for i in range(3)]
    assert relative_rms(found, torch.cat([part @ dense[e].T for part, e in zip(parts, (2, 0, 1), strict=True)])) < 1e-6
    assert relative_rms(found, torch.cat([part @ dense[e].T for part, e in zip(parts, (2, 1, 0), strict=True)])) > 0.1
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


def test_which_rows_go_there() -> None:
    rows, weights = torch.randn(2, IN), torch.randn(E, OUT, IN)
    four_bits, eight_bits = (QuantizedWeight.quantize(weights, kind) for kind in ("mxfp4", "int8"))
    assert reader_of(four_bits).multiplies_pairs(rows.bfloat16()) == this_processor().has("avx512_bf16")
    assert not reader_of(eight_bits).multiplies_pairs(rows.bfloat16())
    assert not reader_of(four_bits, torch.float32).multiplies_pairs(rows)
