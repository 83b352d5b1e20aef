"""The gate's products: 16-bit operands on the matrix unit, sums in fp32.

A product of two 16-bit floats is exact in fp32, so logits from 16-bit operands differ from those of an fp32 product by
the rounding of sums only. What is fp32 itself, router weights or a gradient of logits, is split into 16-bit parts
first: bf16 has 8 significant bits, three parts of it 24, as many as fp32.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.arithmetic import cdiv, next_power_of_2
from moe_triton_kernels.launch import BLACKWELL, HOPPER, Launch, compiler_fences, prepare, target_of

SPLIT_BLOCK = 1024


@triton.jit(do_not_specialize=["num_elements"])
def split_kernel(
    values, parts, num_elements, step, row_stride, place_stride,
    COLUMNS: tl.constexpr, ORDER: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Part ORDER[i] of every value of a matrix with COLUMNS columns goes to place i. See `split`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = at < num_elements
    value = tl.load(values + at, mask=exists, other=0.0).to(tl.float32)
    dtype = parts.dtype.element_ty
    first = value.to(dtype)
    # of an infinity, or of what is one in this dtype, nothing is left
    rest = tl.where(tl.abs(first.to(tl.float32)) == float("inf"), 0.0, (value - first.to(tl.float32)) * step)
    second = rest.to(dtype)
    third = ((rest - second.to(tl.float32)) * step).to(dtype)
    target = parts + at // COLUMNS * row_stride + at % COLUMNS
    for place in tl.static_range(PLACES):
        part = first if ORDER[place] == 0 else second if ORDER[place] == 1 else third
        tl.store(target + place * place_stride, part, mask=exists)


def split(values: Tensor, dtype: torch.dtype, order: tuple[int, ...], *, stacked: bool, step: float = 1.0) -> Tensor:
    """fp32 [R, C] -> its 16-bit parts of these numbers: [P * R, C] `stacked`, else side by side, [R, P * C].

    Part 0 is the nearest to the value, part 1 the nearest to what that leaves times `step`, part 2 to what that leaves
    times `step`.
    """
    rows, columns = values.shape
    places = len(order)
    parts = torch.empty(
        (places * rows, columns) if stacked else (rows, places * columns), dtype=dtype, device=values.device
    )
    if values.numel() == 0:
        return parts
    split_kernel[(cdiv(values.numel(), SPLIT_BLOCK),)](
        values.contiguous(), parts, values.numel(), step,
        columns if stacked else places * columns, rows * columns if stacked else columns,
        COLUMNS=columns, ORDER=order, PLACES=places, BLOCK=SPLIT_BLOCK,
    )  # fmt: skip
    return parts


@triton.jit(do_not_specialize=["size_m", "size_k"])
def product_kernel(
    a, b, addend, out, size_m, size_k, a_stride_m, a_stride_k, b_stride_k, b_stride_n,
    SIZE_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [m, n] = a [m, k] @ b [k, n] + addend [m, n], summed in fp32; out and addend are contiguous."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row_exists, column_exists = row < size_m, column < SIZE_N
    a_pointers = a + row[:, None] * a_stride_m + k[None, :].to(tl.int64) * a_stride_k
    b_pointers = b + k[:, None].to(tl.int64) * b_stride_k + column[None, :].to(tl.int64) * b_stride_n
    a_step, b_step = tl.full([], BLOCK_K, tl.int64) * a_stride_k, tl.full([], BLOCK_K, tl.int64) * b_stride_k
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in tl.range(0, tl.cdiv(size_k, BLOCK_K)):
        if EVEN_K:
            left = tl.load(a_pointers, mask=row_exists[:, None], other=0.0)
            right = tl.load(b_pointers, mask=column_exists[None, :], other=0.0)
        else:
            inside = k < size_k - block * BLOCK_K
            left = tl.load(a_pointers, mask=row_exists[:, None] & inside[None, :], other=0.0)
            right = tl.load(b_pointers, mask=inside[:, None] & column_exists[None, :], other=0.0)
        acc = tl.dot(left, right, acc)
        a_pointers += a_step
        b_pointers += b_step
    cells = row[:, None] * SIZE_N + column[None, :]
    mask = row_exists[:, None] & column_exists[None, :]
    if addend is not None:
        acc += tl.load(addend + cells, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + cells, acc, mask=mask)


def blocks(size_n: int, architecture: str) -> dict[str, int]:
    """BLOCK_M, BLOCK_N and BLOCK_K: short tiles, since the products read or write much and compute little."""
    if architecture == "interpreter":
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}
    return {"BLOCK_M": 64, "BLOCK_N": min(128, max(16, next_power_of_2(size_n))), "BLOCK_K": 64}


def stages(architecture: str) -> int:
    """1, so copies through registers, where Triton puts no fence behind asynchronous ones (see `grouped_gemm`)."""
    if architecture in HOPPER + BLACKWELL and not compiler_fences():
        return 1
    return 2 if architecture.startswith("gfx") else 3


def product(a: Tensor, b: Tensor, dtype: torch.dtype, addend: Tensor | None = None) -> Tensor:
    """16-bit a [M, K] @ b [K, N] + addend [M, N], summed in fp32 and rounded once to `dtype`. Any strides."""
    (size_m, size_k), size_n = a.shape, b.shape[1]
    out = a.new_empty(size_m, size_n, dtype=dtype)
    if size_m == 0 or size_n == 0:
        return out
    a_strides = a.stride()
    architecture, fences = target_of(a.device).architecture, compiler_fences()
    launch = _launch(size_m, size_n, size_k, a_strides[1] == 1, architecture, fences)
    launch(a, b, None if addend is None else addend.contiguous(), out, size_m, size_k, *a_strides, *b.stride())
    return out


@lru_cache(maxsize=4096)
def _launch(size_m: int, size_n: int, size_k: int, is_contiguous: bool, architecture: str, _fences: bool) -> Launch:
    sizes = blocks(size_n, architecture)
    is_even = is_contiguous and size_k % sizes["BLOCK_K"] == 0  # a contraction over tokens compiles for any number
    grid = (cdiv(size_m, sizes["BLOCK_M"]), cdiv(size_n, sizes["BLOCK_N"]))
    options = {**sizes, "num_warps": 4, "num_stages": stages(architecture)}
    return prepare(product_kernel, grid, SIZE_N=size_n, EVEN_K=is_even, **options)
