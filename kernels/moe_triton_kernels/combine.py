"""Combine: every token gathers its rows and adds them, in the order of its choices. No atomics."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.arithmetic import cdiv
from moe_triton_kernels.launch import Launch, prepare

BLOCK_T = 4
BLOCK_D = 256


@triton.jit(do_not_specialize=["num_tokens"])
def combine_kernel(
    rows,
    position,
    out,
    num_tokens,
    row_stride,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[t] = the sum of rows[position[t, k]] over the k whose position is not negative, for BLOCK_D columns."""
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    exists = token < num_tokens
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in tl.range(0, TOP_K, loop_unroll_factor=8):  # unrolled, so that the rows' loads overlap
        row = tl.load(position + token * TOP_K + k, mask=exists, other=-1).to(tl.int64)[:, None]
        cell = row * row_stride + column
        total += tl.load(rows + cell, mask=(row >= 0) & (column < HIDDEN), other=0.0).to(tl.float32)
    tl.store(out + token[:, None] * HIDDEN + column, total, mask=exists[:, None] & (column < HIDDEN))


def combine(rows: Tensor, position: Tensor, dtype: torch.dtype) -> Tensor:
    """rows [S, d], position [T, K] int32 -> out [T, d] in `dtype`: each token's rows, added in fp32 in order of choice.

    A position of -1 adds nothing; a token of which all are -1 gets zeros. Rows at no position are never read.
    """
    num_tokens, top_k = position.shape
    hidden = rows.shape[1]
    out = rows.new_empty(num_tokens, hidden, dtype=dtype)
    if num_tokens == 0 or hidden == 0:
        return out
    row_stride, column_stride = rows.stride()
    if column_stride != 1:
        rows, row_stride = rows.contiguous(), hidden
    _launch(num_tokens, hidden, top_k)(rows, position.contiguous(), out, num_tokens, row_stride)
    return out


@lru_cache(maxsize=4096)
def _launch(num_tokens: int, hidden: int, top_k: int) -> Launch:
    grid = (cdiv(num_tokens, BLOCK_T), cdiv(hidden, BLOCK_D))
    return prepare(combine_kernel, grid, HIDDEN=hidden, TOP_K=top_k, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D)
