"""Row pieces against their definition, and the gradients that are summed from them: right, and the same every time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_triton_kernels import row_pieces as module
from moe_triton_kernels.d_weight import d_bias, d_weight
from moe_triton_kernels.launch import Config
from moe_triton_kernels.row_pieces import RowPieces, piece_rows_for, row_pieces
from tests.helpers.compare import assert_close

device = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = Config(block_m=32, block_n=32, block_k=32, num_warps=4, num_stages=1, group=2, parts=2)
COUNTS = (5, 0, 150, 33, 66)  # split, at 33 rows a piece: 150 in 4, 66 in 2; 33 and less are whole


def offsets_of(counts: list[int] | tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int().to(device)


def filled(pieces: RowPieces) -> tuple[list[list[int]], list[list[int]]]:
    num_pieces, _, num_splits, _ = pieces.state.tolist()
    return pieces.pieces[:num_pieces].tolist(), pieces.splits[:num_splits].tolist()


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_pieces_follow_their_definition(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=9))
    piece_rows = data.draw(st.sampled_from([1, 2, 7, 40, 1000]))
    spare = data.draw(st.integers(0, 20))  # rows that no expert has
    pieces = row_pieces(offsets_of(counts), sum(counts) + spare, piece_rows)
    expected, splits = [], []
    for expert in sorted(range(len(counts)), key=lambda e: (-counts[e], e)):
        first, parts = sum(counts[:expert]), max(counts[expert] // piece_rows, 1)
        if parts > 1:
            splits.append([expert, len(expected), parts])
        for part in range(parts):
            span = [first + counts[expert] * at // parts for at in (part, part + 1)]
            expected.append([expert, *span])
    assert filled(pieces) == (expected, splits)
    assert pieces.state.tolist() == [len(expected), sum(split[2] for split in splits), len(splits), 0]
    assert len(expected) <= pieces.pieces.shape[0]
    assert len(splits) <= pieces.splits.shape[0]
    assert sum(split[2] for split in splits) <= pieces.num_slots


def test_more_pieces_than_a_program_writes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 16)
    pieces, splits = filled(row_pieces(offsets_of((3, 50)), 53, 1))
    assert splits == [[1, 0, 50], [0, 50, 3]]
    assert [piece[1:] for piece in pieces[:50]] == [[row, row + 1] for row in range(3, 53)]


def test_the_sizes_bound_the_partial_results() -> None:
    assert piece_rows_for(327_680, 12, 512) == 7680
    assert piece_rows_for(327_680, 600, 512) > 327_680  # enough tiles without a split
    assert piece_rows_for(4000, 1, 512) == module.MIN_PIECE_ROWS
    for tiles in (1, 6, 12, 200, 255, 256, 257):
        slots = 327_680 // piece_rows_for(327_680, tiles, 512)
        assert slots * tiles <= 512


@pytest.mark.parametrize(
    ("gather_left", "dtype"),
    [(False, torch.float32), (True, torch.float32), (False, torch.float16), (True, torch.bfloat16)],
)
def test_d_weight_of_split_experts(gather_left: bool, dtype: torch.dtype) -> None:
    """Against float64; twice the same bits; whole experts have the bits that they have without a split."""
    rows, top_k = sum(COUNTS) + 6, 2
    source = torch.cat([torch.randperm(rows)[: sum(COUNTS)].int(), torch.full((6,), -1, dtype=torch.int32)]).to(device)
    tokens = torch.randn(rows // top_k, 40, device=device).to(dtype)
    in_order = torch.randn(rows, 24, device=device).to(dtype)
    in_order[sum(COUNTS) :] = float("nan")
    operands = (tokens, in_order) if gather_left else (in_order, tokens)
    options = {"top_k": top_k, "gather_left": gather_left, "config": CONFIG}
    whole = d_weight(*operands, source, offsets_of(COUNTS), **options)
    split = d_weight(*operands, source, offsets_of(COUNTS), **options, piece_rows=33)
    again = d_weight(*operands, source, offsets_of(COUNTS), **options, piece_rows=33)
    assert torch.equal(split, again)
    for expert, count in enumerate(COUNTS):
        span = slice(sum(COUNTS[:expert]), sum(COUNTS[: expert + 1]))
        expected = in_order[span].double().T @ tokens[source[span].long() // top_k].double()
        assert_close(split[expert], expected.T if gather_left else expected)
        if count < 66:
            assert torch.equal(split[expert], whole[expert])
    if dtype == torch.float32:
        assert not torch.equal(split[2], whole[2])  # it was split: the order of the sum is another
    shifted = split.roll(1, 1)
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_close(shifted, whole.double())


@pytest.mark.parametrize("gathered", [False, True])
def test_d_bias_of_split_experts(gathered: bool) -> None:
    rows, top_k = sum(COUNTS), 2
    source = torch.randperm(rows).int().to(device)
    weights = torch.rand(rows // top_k, top_k, device=device) + 0.1
    values = torch.randn(rows // top_k if gathered else rows, 136, device=device)
    options = {"top_k": top_k, "router_weights": weights if gathered else None, "piece_rows": 33}
    grad = d_bias(values, source, offsets_of(COUNTS), **options)
    assert torch.equal(grad, d_bias(values, source, offsets_of(COUNTS), **options))
    slots = source.long()
    wide = values.double()
    per_row = wide[slots // top_k] * weights.reshape(-1)[slots, None].double() if gathered else wide
    expected = torch.stack([part.sum(0) for part in per_row.split(list(COUNTS))])
    assert_close(grad, expected)
    assert (grad[1] == 0).all()
