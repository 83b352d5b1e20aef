"""Ids and weights in the tails of rows: the same bits, whatever the dtypes, widths and strides."""

from __future__ import annotations

import pytest
import torch

from moe_triton.distributed.exchange.tails import Part, parts_of, tail_of, tail_width

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "slots"), [(5, 3), (1, 1), (0, 4), (2, 8)])
def test_round_trip(dtype, weights, rows, slots):
    parts = [
        torch.randint(-1, 2**31 - 1, (rows, slots), dtype=torch.int32),
        torch.randn(slots, rows, dtype=weights).t(),
    ]
    if rows:
        parts[1][0, 0] = float("nan")
    tail = tail_of(parts, dtype)
    what = [Part(part.shape[1], part.dtype) for part in parts]
    assert tail.shape == (rows, tail_width(what, dtype))
    message = torch.cat([torch.randn(rows, 7).to(dtype), tail], dim=1)
    for got, wanted in zip(parts_of(message[:, 7:], what), parts, strict=True):
        assert torch.equal(got.view(torch.uint8), wanted.contiguous().view(torch.uint8))


def test_no_rows_of_any_strides():
    parts = [torch.empty(4, 0, dtype=torch.int32).t().expand(0, 4), torch.empty(0, 1)[:, :, None].expand(0, 1, 3)[:, 0]]
    what = [Part(part.shape[1], part.dtype) for part in parts]
    assert [part.shape for part in parts_of(tail_of(parts, torch.bfloat16), what)] == [(0, 4), (0, 3)]
