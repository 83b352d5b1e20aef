"""Quantised projections: codes of few bits that become numbers in registers, where a product needs them.

Each expert's projection [out, in] lies in memory as codes of four or eight bits, those of four two in a byte along
`in`, the even one in the low half, and as scales, one for every block of numbers:

    number = value(code) * scale           (times the expert's global scale, where there is one)
    number = (code - zero point) * scale   (integers)

A number is computed in fp32 and rounded once, to the dtype of the rows that are multiplied: the bits of
`QuantizedWeight.dequantize` of moe_triton, whose `quantization/formats.py` defines the formats. The same bytes serve
the product by a projection and by its transpose.

The main loop of `grouped_gemm` decodes a block at every step. A block is so decoded once for every tile of rows that
an expert has; where these are many (`heuristics.decodes_in_loop`), `decode` first writes all of the numbers to memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.arithmetic import cdiv
from moe_triton_kernels.operands import Columns, PerExpert, expert_base, number_columns

E2M1, E4M3, INTEGER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
VALUES = {"e2m1": E2M1, "e4m3": E4M3, "integer": INTEGER}
FORMATS = {  # format -> value of a code, codes in a byte, zero point of integers that are symmetric
    "mxfp4": ("e2m1", 2, 0),
    "nvfp4": ("e2m1", 2, 0),
    "fp8": ("e4m3", 1, 0),
    "int8": ("integer", 1, 128),
    "int4": ("integer", 2, 8),
}
DECODE_BLOCK = (128, 64)  # numbers of a program of `decode`, along `in` and along `out`


class ScalesArgument(NamedTuple):
    """What makes numbers of the codes of a WeightArgument [k, columns], among a kernel's arguments.

    data            [E, blocks along k, blocks of columns]: floats, or bytes, which are e4m3 where there is a global
                    scale and E8M0 (2^(byte - 127), NaN for 255) where there is none
    zeros           zero points that lie as the scales do, or None
    global_scale    [E] fp32, or None
    VALUE           what a code stands for: E2M1, E4M3 or INTEGER
    ZERO            the zero point where there are no `zeros`
    BYTE_K, BYTE_N  codes of one byte along k and along the columns: 2 and 1, 1 and 2, or 1 and 1
    BLOCK_K, BLOCK_N  numbers of one scale along k and along the columns
    """

    data: Any
    zeros: Any
    global_scale: Any
    stride_e: Any
    stride_k: Any
    stride_n: Any
    VALUE: Any
    ZERO: Any
    BYTE_K: Any
    BYTE_N: Any
    BLOCK_K: Any
    BLOCK_N: Any


@dataclass(frozen=True, kw_only=True)
class Scales:
    """What makes numbers of the codes of a `PerExpert`; pairs are along the two dimensions of its matrices.

    data, zeros, global_scale   as in `ScalesArgument`
    strides     of one expert's scales
    value       a key of VALUES
    zero        the zero point where there are no `zeros`
    per_byte    codes of one byte
    block       numbers of one scale
    size        numbers of one expert's matrix
    """

    data: Tensor
    zeros: Tensor | None
    global_scale: Tensor | None
    strides: tuple[int, int]
    value: str
    zero: int
    per_byte: tuple[int, int]
    block: tuple[int, int]
    size: tuple[int, int]

    def transposed(self) -> Scales:
        return replace(
            self,
            strides=self.strides[::-1],
            per_byte=self.per_byte[::-1],
            block=self.block[::-1],
            size=self.size[::-1],
        )

    def argument(self) -> ScalesArgument:
        constants = (VALUES[self.value], *map(tl.constexpr, (self.zero, *self.per_byte, *self.block)))
        parts = (self.data, self.zeros, self.global_scale)
        return ScalesArgument(*parts, self.data.stride(0), *self.strides, *constants)


def quantized_per_expert(
    format: str,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    global_scale: Tensor | None = None,
    *,
    block: tuple[int, int],
) -> PerExpert:
    """Make the parts of a quantised projection readable by a kernel, as matrices [out, in].

    codes [E, out, in] of one byte each, or [E, out, in/2]; scales and zeros [E, blocks along out, blocks along in];
    global_scale [E] fp32; block: numbers of one scale along out and in. Nothing is copied, except what is not
    contiguous along `in`.
    """
    value, per_byte, zero = FORMATS[format]
    codes = codes.view(torch.uint8) if codes.stride(2) == 1 else codes.contiguous().view(torch.uint8)
    scales = scales.contiguous()
    return PerExpert(
        data=codes,
        stride_e=codes.stride(0),
        strides=codes.stride()[1:],
        alignment=1,
        held=(codes,),
        scales=Scales(
            data=scales if scales.dtype in (torch.float32, torch.bfloat16, torch.float16) else scales.view(torch.uint8),
            zeros=None if zeros is None else zeros.contiguous(),
            global_scale=None if global_scale is None else global_scale.contiguous(),
            strides=(scales.stride(1), scales.stride(2)),
            value=value,
            zero=zero,
            per_byte=(1, per_byte),
            block=block,
            size=(codes.shape[1], codes.shape[2] * per_byte),
        ),
    )


@triton.jit
def e2m1_values(codes):
    """fp32 of codes of four bits; the bits of a code are placed in an fp32 number, whose exponent is 126 too low."""
    bits = codes.to(tl.uint32)
    return ((bits & 7) << 22 | (bits & 8) << 28).to(tl.float32, bitcast=True) * (2.0**126)


@triton.jit
def e4m3_values(codes):
    """fp32 of e4m3 in bytes, as `e2m1_values`; not every architecture has an instruction for it."""
    bits = codes.to(tl.uint32)
    values = ((bits & 0x7F) << 20 | (bits & 0x80) << 24).to(tl.float32, bitcast=True) * (2.0**120)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), values)


@triton.jit
def e8m0_values(codes):
    """fp32 of E8M0 in bytes: 2^(byte - 127), a subnormal number for 0, and NaN for 255."""
    bits = codes.to(tl.uint32) << 23
    bits = tl.where(codes == 0, 0x00400000, bits)
    return tl.where(codes == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def integer_values(codes, zeros):
    """fp32 of codes - zeros, both below 2^23: the code is the low end of the mantissa of 2^23, which is taken off."""
    return (codes.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - (zeros + 8388608.0)


@triton.jit
def code_values(codes, zeros, VALUE: tl.constexpr):
    """fp32 of codes before scaling."""
    if VALUE == E2M1:
        return e2m1_values(codes)
    elif VALUE == E4M3:
        return e4m3_values(codes)
    else:
        return integer_values(codes, zeros)


@triton.jit
def spread(blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[r, c] -> [ROWS, COLUMNS]: every element as often as there is room for it, side by side."""
    r: tl.constexpr = blocks.shape[0]
    c: tl.constexpr = blocks.shape[1]
    return tl.broadcast_to(blocks[:, None, :, None], (r, ROWS // r, c, COLUMNS // c)).reshape(ROWS, COLUMNS)


@triton.jit
def load_blocks(columns, parts, start, size_k, BLOCK_K: tl.constexpr):
    """Of the scales, or of the zero points, those of a block of BLOCK_K from `start` on by `Columns`; 0 outside."""
    STEP: tl.constexpr = columns.weight.scales.BLOCK_K
    COUNT: tl.constexpr = BLOCK_K // STEP if BLOCK_K > STEP else 1
    n, inside_n = number_columns(columns, columns.weight.scales.BLOCK_N)
    k = start // STEP + tl.arange(0, COUNT)
    first = parts + columns.expert.to(tl.int64) * columns.weight.scales.stride_e
    cells = first + n.to(tl.int64)[None, :] * columns.weight.scales.stride_n
    cells += k.to(tl.int64)[:, None] * columns.weight.scales.stride_k
    return tl.load(cells, mask=(k < tl.cdiv(size_k, STEP))[:, None] & inside_n[None, :], other=0)


@triton.jit
def load_scales(columns, start, size_k, BLOCK_K: tl.constexpr):
    """What `decode_columns` needs beside the codes, as it is in memory: scales, and zero points where there are any."""
    scales = load_blocks(columns, columns.weight.scales.data, start, size_k, BLOCK_K)
    if columns.weight.scales.zeros is None:
        return (scales,)
    else:
        return scales, load_blocks(columns, columns.weight.scales.zeros, start, size_k, BLOCK_K)


@triton.jit
def load_global_scale(columns):
    """The expert's global scale; 1 where the format has none."""
    if columns.weight.scales.global_scale is None:
        return 1.0
    else:
        return tl.load(columns.weight.scales.global_scale + columns.expert)


@triton.jit
def decode_columns(columns, start, size_k, scales, global_scale, DTYPE: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_K, HALVES * WIDTH] of DTYPE from k = `start` on by quantised `Columns`; 0 past size_k. EVEN_K: all is.

    scales, global_scale: of `load_scales` at the same `start`, and of `load_global_scale`.
    """
    BYTE_K: tl.constexpr = columns.weight.scales.BYTE_K
    BYTE_N: tl.constexpr = columns.weight.scales.BYTE_N
    WIDTH: tl.constexpr = columns.HALVES * columns.WIDTH
    n, inside_n = number_columns(columns, BYTE_N)
    k = start // BYTE_K + tl.arange(0, BLOCK_K // BYTE_K)
    cells = expert_base(columns.weight, columns.expert, tl.uint8) + n.to(tl.int64)[None, :] * columns.weight.stride_n
    cells += k.to(tl.int64)[:, None] * columns.weight.stride_k
    mask = inside_n[None, :]
    if not EVEN_K:
        mask = mask & (k < tl.cdiv(size_k, BYTE_K))[:, None]
    codes = tl.load(cells, mask=mask, other=0)
    if columns.weight.scales.data.dtype.element_ty != tl.uint8:
        factor = scales[0].to(tl.float32)
    elif columns.weight.scales.global_scale is None:
        factor = e8m0_values(scales[0])
    else:
        factor = e4m3_values(scales[0]) * global_scale
    factor = spread(factor, BLOCK_K // BYTE_K, WIDTH // BYTE_N)
    if columns.weight.scales.zeros is None:
        zeros = columns.weight.scales.ZERO
    else:
        zeros = spread(scales[1].to(tl.float32), BLOCK_K // BYTE_K, WIDTH // BYTE_N)
    if BYTE_K * BYTE_N == 1:
        return (code_values(codes, zeros, columns.weight.scales.VALUE) * factor).to(DTYPE)
    else:
        low = (code_values(codes & 15, zeros, columns.weight.scales.VALUE) * factor).to(DTYPE)
        high = (code_values(codes >> 4, zeros, columns.weight.scales.VALUE) * factor).to(DTYPE)
        pairs = tl.join(low, high)
        if BYTE_K == 2:
            pairs = pairs.permute(0, 2, 1)
        return pairs.reshape(BLOCK_K, WIDTH)


@triton.jit
def decode_kernel(
    weight,  # per expert [k, columns], codes
    out,  # [E, k, columns]
    stride_k,  # of out
    stride_n,  # of out
    size_k,
    size_columns,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program for every block of every expert's matrix."""
    start, first, expert = tl.program_id(0) * BLOCK_K, tl.program_id(1) * BLOCK_N, tl.program_id(2)
    numbers = decode_columns(
        Columns(weight, None, expert, first, size_columns, 1, BLOCK_N),
        start,
        size_k,
        load_scales(Columns(weight, None, expert, first, size_columns, 1, BLOCK_N), start, size_k, BLOCK_K),
        load_global_scale(Columns(weight, None, expert, first, size_columns, 1, BLOCK_N)),
        out.dtype.element_ty,
        False,
        BLOCK_K,
    )
    k, n = start + tl.arange(0, BLOCK_K), first + tl.arange(0, BLOCK_N)
    cells = out + expert.to(tl.int64) * size_k * size_columns + k.to(tl.int64)[:, None] * stride_k
    mask = (k < size_k)[:, None] & (n < size_columns)[None, :]
    tl.store(cells + n.to(tl.int64)[None, :] * stride_n, numbers, mask=mask)


def decode(weight: PerExpert, dtype: torch.dtype) -> PerExpert:
    """All numbers of quantised matrices [k, columns], in memory of their own that lies as the codes do."""
    scales = weight.scales
    assert scales is not None
    by_k = weight.strides[0] == 1
    size_k, size_columns = scales.size
    num_experts = weight.data.shape[0]
    out = torch.empty((num_experts, *(scales.size[::-1] if by_k else scales.size)), dtype=dtype, device=weight.data.device)
    strides = (1, size_k) if by_k else (size_columns, 1)
    block_k, block_n = DECODE_BLOCK if by_k else DECODE_BLOCK[::-1]
    if out.numel() > 0:
        decode_kernel[(cdiv(size_k, block_k), cdiv(size_columns, block_n), num_experts)](
            weight.weight(), out, *strides, size_k, size_columns, BLOCK_K=block_k, BLOCK_N=block_n
        )
    return PerExpert(
        data=out, stride_e=out.stride(0), strides=strides, alignment=out.element_size(), held=(out,), adapter=weight.adapter
    )
