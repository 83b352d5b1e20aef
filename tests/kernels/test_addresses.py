"""Offsets beyond 2**31 elements, and reads past a buffer's end, shown with memory that is mapped but not filled.

A wrong address ends the process with a segmentation fault, and pytest prints the test that made it.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_triton_kernels.activations import Activation
from moe_triton_kernels.combine import combine
from moe_triton_kernels.d_hidden import d_hidden
from moe_triton_kernels.d_weight import d_bias, d_weight
from moe_triton_kernels.down import down
from moe_triton_kernels.launch import Config
from moe_triton_kernels.operands import per_expert
from moe_triton_kernels.row_pieces import row_pieces
from moe_triton_kernels.tiles import tile_tables
from moe_triton_kernels.up import up

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the memory tricks are the CPU's; the kernels too")

RELU = Activation("relu")
SMALL = Config(block_m=16, block_n=16, block_k=16, num_warps=4, num_stages=1)
FAR = 2**31  # the first element that an int32 cannot reach
SIZE = 64
COUNT = 5  # rows of the one expert that has any


def lazy(num_elements: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Zeros that take no memory until they are written: an anonymous mapping."""
    size = num_elements * dtype.itemsize
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(mapping, dtype=dtype)


def far_rows(width: int) -> tuple[Tensor, int]:
    """A matrix of `width` columns whose rows from the returned one on lie beyond 2**31 elements."""
    first = FAR // width + 16
    rows = lazy((first + 16) * width).view(-1, width)
    rows[first : first + COUNT] = torch.randn(COUNT, width).half()
    return rows, first


@pytest.fixture
def lazy_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher allocates takes no memory either."""

    def new_empty(self: Tensor, *sizes: Any, dtype: torch.dtype | None = None, device: object = None) -> Tensor:
        shape = sizes if isinstance(sizes[0], int) else sizes[0]
        size = torch.Size(shape).numel()
        return lazy(max(1, size), dtype or self.dtype)[:size].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda x: new_empty(x, x.shape))


def far_tokens() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A far token matrix [T, 64], the source of COUNT rows that read its last tokens, and their offsets and tokens."""
    tokens, first = far_rows(SIZE)
    source = torch.arange(first, first + COUNT, dtype=torch.int32)
    return tokens, source, torch.tensor([0, COUNT], dtype=torch.int32), tokens[first : first + COUNT].float()


def test_up_gathers_far_tokens() -> None:
    tokens, source, offsets, picked = far_tokens()
    weight = torch.randn(1, SIZE, 16).half()
    out, _ = up(
        tokens, source, tile_tables(offsets, COUNT), per_expert(weight), None,
        size_n=16, top_k=1, activation=RELU, is_concatenated=True, keep_activation=True, keep_preactivation=False,
        config=SMALL,
    )  # fmt: skip
    torch.testing.assert_close(out.float(), (picked @ weight[0].float()).relu(), rtol=1e-2, atol=1e-2)


def test_d_hidden_gathers_far_gradients() -> None:
    tokens, source, offsets, picked = far_tokens()
    weight, h = torch.randn(1, SIZE, 16).half(), torch.ones(COUNT, 16).half()
    router_weights = lazy(tokens.shape[0], torch.float32)[:, None]
    router_weights[source.long()] = 1.0
    _, grad_h, _ = d_hidden(
        tokens, source, tile_tables(offsets, COUNT), per_expert(weight), h, router_weights,
        size_n=16, activation=RELU, is_concatenated=True, config=SMALL,
    )  # fmt: skip
    torch.testing.assert_close(grad_h.float(), picked @ weight[0].float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("gather_left", [False, True])
def test_d_weight_gathers_far_tokens(gather_left: bool) -> None:
    tokens, source, offsets, picked = far_tokens()
    rows = torch.randn(COUNT, 16).half()
    operands = (tokens, rows) if gather_left else (rows, tokens)
    got = d_weight(*operands, source, offsets, top_k=1, gather_left=gather_left, config=SMALL)[0].float()
    expected = picked.T @ rows.float()
    torch.testing.assert_close(got, expected if gather_left else expected.T, rtol=1e-2, atol=1e-2)
    if gather_left:
        sums = d_bias(tokens, source, offsets, top_k=1, router_weights=lazy(tokens.shape[0], torch.float32) + 1)
        torch.testing.assert_close(sums[0].float(), picked.sum(0), rtol=1e-2, atol=1e-2)


def test_combine_gathers_far_rows() -> None:
    rows, first = far_rows(SIZE)
    position = torch.arange(first, first + COUNT, dtype=torch.int32)[:, None]
    assert torch.equal(combine(rows, position, torch.float16), rows[first : first + COUNT])


WIDE = 2**16  # columns, so that few rows reach far
FAR_OFFSETS = torch.tensor([FAR // WIDE + 16, FAR // WIDE + 16 + COUNT], dtype=torch.int32)


def test_down_reads_far_rows() -> None:
    rows, first = far_rows(WIDE)
    weight = torch.randn(1, WIDE, 16).half() / 256
    config = replace(SMALL, block_k=2048)
    out = down(rows, tile_tables(FAR_OFFSETS, COUNT), per_expert(weight), size_columns=16, config=config)
    expected = rows[first : first + COUNT].float() @ weight[0].float()
    torch.testing.assert_close(out[first : first + COUNT].float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("lazy_results")
def test_down_and_up_write_far_rows() -> None:
    first = int(FAR_OFFSETS[0])
    a, weight = torch.zeros(first + 16, 16).half(), torch.randn(1, 16, WIDE).half()
    a[first : first + COUNT] = torch.randn(COUNT, 16).half()
    config = replace(SMALL, block_n=4096)
    out = down(a, tile_tables(FAR_OFFSETS, COUNT), per_expert(weight), size_columns=WIDE, config=config)
    expected = a[first : first + COUNT].float() @ weight[0].float()
    torch.testing.assert_close(out[first : first + COUNT].float(), expected, rtol=1e-2, atol=1e-2)
    source = torch.arange(first + 16, dtype=torch.int32)
    for kept in (0, 1):
        results = up(
            a, source, tile_tables(FAR_OFFSETS, COUNT), per_expert(weight), None, size_n=WIDE, top_k=1,
            activation=RELU, is_concatenated=True, keep_activation=kept == 0, keep_preactivation=kept == 1,
            config=config,
        )  # fmt: skip
        wanted = expected.relu() if kept == 0 else expected
        torch.testing.assert_close(results[kept][first : first + COUNT].float(), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("lazy_results")
def test_d_hidden_reads_and_writes_far_rows() -> None:
    h, first = far_rows(WIDE)
    here = slice(first, first + COUNT)
    grad_out, weight = torch.randn(first + 16, 16).half(), torch.randn(1, 16, WIDE).half()
    weighted_a, grad_h, _ = d_hidden(
        grad_out, torch.arange(first + 16, dtype=torch.int32), tile_tables(FAR_OFFSETS, COUNT), per_expert(weight), h,
        torch.ones(first + 16, 1), size_n=WIDE, activation=RELU, is_concatenated=True,
        config=replace(SMALL, block_n=4096),
    )  # fmt: skip
    assert torch.equal(weighted_a[here], h[here].relu())
    wanted = (grad_out[here].float() @ weight[0].float()) * (h[here] > 0)
    torch.testing.assert_close(grad_h[here].float(), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("gather_left", [False, True])
@pytest.mark.usefixtures("lazy_results")
def test_d_weight_reads_far_rows(gather_left: bool) -> None:
    rows, first = far_rows(SIZE)
    source, offsets = lazy(rows.shape[0], torch.int32), torch.tensor([first, first + COUNT], dtype=torch.int32)
    source[first : first + COUNT] = torch.arange(COUNT, dtype=torch.int32)
    tokens = torch.randn(COUNT, 16).half()
    operands = (tokens, rows) if gather_left else (rows, tokens)
    got = d_weight(*operands, source, offsets, top_k=1, gather_left=gather_left, config=SMALL)[0].float()
    expected = rows[first : first + COUNT].float().T @ tokens.float()
    torch.testing.assert_close(got, expected.T if gather_left else expected, rtol=1e-2, atol=1e-2)


def test_pieces_of_an_expert_with_so_many_rows_that_their_product_with_the_pieces_passes_int32() -> None:
    count = 2**31 - 17
    pieces = row_pieces(torch.tensor([0, count], dtype=torch.int32), count, count // 300)
    num_pieces = pieces.state[0].item()
    assert num_pieces == count // (count // 300)
    expected = [[0, count * part // num_pieces, count * (part + 1) // num_pieces] for part in range(num_pieces)]
    assert pieces.pieces[:num_pieces].tolist() == expected


def test_down_reads_nothing_past_the_rows() -> None:
    """The last tile is not full, and the page behind the last row may not be read."""
    page, rows = mmap.PAGESIZE, 5
    mapping = mmap.mmap(-1, 2 * page)
    whole = torch.frombuffer(mapping, dtype=torch.float32)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    boundary = whole.data_ptr() + page
    assert libc.mprotect(boundary, page, 0) == 0, "mprotect failed"
    try:
        a = whole[: page // 4][-rows * SIZE :].view(rows, SIZE)
        a.copy_(torch.randn(rows, SIZE))
        offsets, weight = torch.tensor([0, rows], dtype=torch.int32), torch.randn(1, SIZE, 16)
        tiles = tile_tables(offsets, rows)
        out = down(a, tiles, per_expert(weight), size_columns=16, config=SMALL)
        torch.testing.assert_close(out, a @ weight[0], rtol=1e-4, atol=1e-4)
    finally:
        libc.mprotect(boundary, page, 3)
