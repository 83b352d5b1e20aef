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
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.arithmetic import cdiv
from moe_triton_kernels.operands import Columns, PerExpert, layout_of, number_columns

E2M1, E4M3, INTEGER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
FORMATS = {  # format -> value of a code, codes in a word, zero point of integers that are symmetric
    "mxfp4": (E2M1, 8, 0),
    "nvfp4": (E2M1, 8, 0),
    "fp8": (E4M3, 4, 0),
    "int8": (INTEGER, 4, 128),
    "int4": (INTEGER, 8, 8),
}
DECODE_BLOCK = (128, 64)  # numbers of a program of `decode`, along `in` and along `out`


class DecodingArgument(NamedTuple):
    """What makes numbers of the codes of a WeightArgument [k, columns], among a kernel's arguments.

    What a format has not is some tensor or number that is not read: Triton 3.6 takes no None this deep in a record.

    data            [E, blocks along k, blocks of columns]: floats, or bytes, which are e4m3 where HAS_GLOBAL and E8M0
                    (2^(byte - 127), NaN for 255) where not
    zeros           zero points that lie as the scales do, where HAS_ZEROS
    zero            else the zero point of all; were it a constant, it would be subtracted in fp32, one by one
    global_scale    [E] fp32, where HAS_GLOBAL
    VALUE           what a code stands for: E2M1, E4M3 or INTEGER
    PER_K, PER_N    codes of one word along k and along the columns: 1 along one of them, 4 or 8 along the other
    BLOCK_K, BLOCK_N  numbers of one scale along k and along the columns
    """

    data: Any
    zeros: Any
    zero: Any
    global_scale: Any
    stride_e: Any
    stride_k: Any
    stride_n: Any
    VALUE: Any
    PER_K: Any
    PER_N: Any
    BLOCK_K: Any
    BLOCK_N: Any
    HAS_ZEROS: Any
    HAS_GLOBAL: Any


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """What makes numbers of the codes of a `PerExpert`; pairs are along the two dimensions of its matrices.

    data, zeros, global_scale   as in `DecodingArgument`
    strides     of one expert's scales
    format      a key of FORMATS
    per_word    codes of one word
    block       numbers of one scale
    size        numbers of one expert's matrix
    """

    data: Tensor
    zeros: Tensor | None
    global_scale: Tensor | None
    strides: tuple[int, int]
    format: str
    per_word: tuple[int, int]
    block: tuple[int, int]
    size: tuple[int, int]

    def transposed(self) -> Decoding:
        return replace(
            self,
            strides=self.strides[::-1],
            per_word=self.per_word[::-1],
            block=self.block[::-1],
            size=self.size[::-1],
        )

    def argument(self) -> DecodingArgument:
        value, _, zero = FORMATS[self.format]
        has = (self.zeros is not None, self.global_scale is not None)
        constants = (value, *map(tl.constexpr, (*self.per_word, *self.block, *has)))
        zeros, global_scale = (self.data if part is None else part for part in (self.zeros, self.global_scale))
        parts = (self.data, zeros, zero, global_scale)
        return DecodingArgument(*parts, self.data.stride(0), *self.strides, *constants)


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
    global_scale [E] fp32; block: numbers of one scale along out and in. Codes that do not lie in words, four bytes
    along `in`, are copied.
    """
    per_word = FORMATS[format][1]
    size = (codes.shape[1], codes.shape[2] * codes.element_size() * per_word // 4)
    codes, scales = words_of(codes), scales.contiguous()
    stride_e, *strides = codes.stride()
    return PerExpert(
        data=codes,
        layout=layout_of(stride_e, tuple(strides), 4, codes.element_size()),
        held=(codes,),
        decoding=Decoding(
            data=scales if scales.dtype in (torch.float32, torch.bfloat16, torch.float16) else scales.view(torch.uint8),
            zeros=None if zeros is None else zeros.contiguous(),
            global_scale=None if global_scale is None else global_scale.contiguous(),
            strides=(scales.stride(1), scales.stride(2)),
            format=format,
            per_word=(1, per_word),
            block=block,
            size=size,
        ),
    )


def words_of(codes: Tensor) -> Tensor:
    """The bytes of codes [E, out, .] as words of four; a copy where they do not lie as such, filled up with zeros."""
    codes = codes.view(torch.uint8)
    if codes.stride(2) != 1 or codes.data_ptr() % 4 or any(size % 4 for size in (codes.shape[2], *codes.stride()[:2])):
        codes = F.pad(codes, (0, -codes.shape[2] % 4)).contiguous()
    return codes.view(torch.int32)


@triton.jit
def e4m3_values(codes):
    """fp32 of e4m3 in bytes: the bits are placed in an fp32 number, whose exponent is then 120 too low.

    Not every architecture has an instruction for it.
    """
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
def halves_of(words, TYPE: tl.constexpr):
    """The numbers of a 16-bit type that are the lower and the upper half of every word."""
    return words.to(tl.uint16).to(TYPE, bitcast=True), (words >> 16).to(tl.uint16).to(TYPE, bitcast=True)


@triton.jit
def shifted(words, LEFT: tl.constexpr):
    if LEFT >= 0:
        return words << LEFT
    else:
        return words >> -LEFT


@triton.jit
def word_values(words, zeros, FIRST: tl.constexpr, PER: tl.constexpr, VALUE: tl.constexpr, TYPE: tl.constexpr):
    """What the codes FIRST and FIRST + PER / 2 of every word of PER stand for before scaling; TYPE: fp16 or bf16.

    Both are made at once, in the halves of a word, and arithmetic on 16-bit numbers is done on two at once: a short
    product has time for no more than a few instructions per number.
    """
    AT: tl.constexpr = FIRST * (32 // PER)  # where the code begins in each half
    if VALUE == INTEGER:
        # the code is the low end of the mantissa of 2^10, which is taken off
        MASK: tl.constexpr = 0x000F000F if PER == 8 else 0x00FF00FF
        low, high = halves_of(shifted(words, -AT) & MASK | 0x64006400, TYPE)
        return low - (zeros + 1024.0), high - (zeros + 1024.0)
    else:
        # the bits of a code are placed in a number, whose exponent is then too low
        TOO_LOW: tl.constexpr = 8 if VALUE == E4M3 else (126 if TYPE.is_bf16() else 14)
        if VALUE == E4M3:
            bits = shifted(words, 7 - AT) & 0x3F803F80
            bits |= (bits + 0x00800080) & 0x40004000  # a NaN has all bits; now all of the exponent's are set
        elif TYPE.is_bf16():
            bits = shifted(words, 6 - AT) & 0x01C001C0
        else:
            bits = shifted(words, 9 - AT) & 0x0E000E00
        low, high = halves_of(bits | shifted(words, 16 - 32 // PER - AT) & 0x80008000, TYPE)
        power = tl.full([], 2.0**TOO_LOW, tl.float32).to(TYPE)
        return low * power, high * power


@triton.jit
def scaled(values, factor, DTYPE: tl.constexpr):
    """The product in fp32, rounded to DTYPE; in bf16 where both are: the factor is a power of two then."""
    if values.dtype == factor.dtype:
        return (values * factor).to(DTYPE)
    else:
        return (values.to(tl.float32) * factor).to(DTYPE)


@triton.jit
def scaled_pair(words, zeros, factor, FIRST: tl.constexpr, PER: tl.constexpr, VALUE: tl.constexpr, DTYPE: tl.constexpr):
    """[., ., 2] in DTYPE: the two numbers of `word_values`."""
    TYPE: tl.constexpr = tl.bfloat16 if factor.dtype.is_bf16() else tl.float16
    low, high = word_values(words, zeros, FIRST, PER, VALUE, TYPE)
    return tl.join(scaled(low, factor, DTYPE), scaled(high, factor, DTYPE))


@triton.jit
def word_numbers(
    words, zeros, factor, PER_K: tl.constexpr, PER_N: tl.constexpr, VALUE: tl.constexpr, DTYPE: tl.constexpr
):
    """[k, columns] in DTYPE of words of codes, which lie along k or along the columns."""
    PER: tl.constexpr = PER_K * PER_N
    # a number's place in its word is spelled out by the last dimensions, the highest bit first
    first = scaled_pair(words, zeros, factor, 0, PER, VALUE, DTYPE)
    second = scaled_pair(words, zeros, factor, 1, PER, VALUE, DTYPE)
    if PER == 8:
        first = tl.join(first, scaled_pair(words, zeros, factor, 2, PER, VALUE, DTYPE))
        second = tl.join(second, scaled_pair(words, zeros, factor, 3, PER, VALUE, DTYPE))
    numbers = tl.join(first, second)
    if PER_K == 8:
        numbers = numbers.permute(0, 2, 3, 4, 1)
    elif PER_K == 4:
        numbers = numbers.permute(0, 2, 3, 1)
    return numbers.reshape(PER_K * words.shape[0], PER_N * words.shape[1])


@triton.jit
def spread(blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[r, c] -> [ROWS, COLUMNS]: every element as often as there is room for it, side by side."""
    r: tl.constexpr = blocks.shape[0]
    c: tl.constexpr = blocks.shape[1]
    return tl.broadcast_to(blocks[:, None, :, None], (r, ROWS // r, c, COLUMNS // c)).reshape(ROWS, COLUMNS)


@triton.jit
def load_blocks(columns, parts, start, size_k, BLOCK_K: tl.constexpr):
    """Of the scales, or of the zero points, those of a block of BLOCK_K from `start` on by `Columns`; 0 outside."""
    STEP: tl.constexpr = columns.weight.decoding.BLOCK_K
    COUNT: tl.constexpr = BLOCK_K // STEP if BLOCK_K > STEP else 1
    n, inside_n = number_columns(columns, columns.weight.decoding.BLOCK_N)
    k = start // STEP + tl.arange(0, COUNT)
    first = parts + columns.expert.to(tl.int64) * columns.weight.decoding.stride_e
    cells = first + n.to(tl.int64)[None, :] * columns.weight.decoding.stride_n
    cells += k.to(tl.int64)[:, None] * columns.weight.decoding.stride_k
    return tl.load(cells, mask=(k < tl.cdiv(size_k, STEP))[:, None] & inside_n[None, :], other=0)


@triton.jit
def load_scales(columns, start, size_k, BLOCK_K: tl.constexpr):
    """What `decode_columns` needs beside the codes, as it is in memory: scales, and zero points where there are any."""
    scales = load_blocks(columns, columns.weight.decoding.data, start, size_k, BLOCK_K)
    if columns.weight.decoding.HAS_ZEROS:
        return scales, load_blocks(columns, columns.weight.decoding.zeros, start, size_k, BLOCK_K)
    else:
        return (scales,)


@triton.jit
def load_global_scale(columns):
    """The expert's global scale; 1 where the format has none."""
    if columns.weight.decoding.HAS_GLOBAL:
        return tl.load(columns.weight.decoding.global_scale + columns.expert)
    else:
        return 1.0


@triton.jit
def factors(columns, scales, global_scale, DTYPE: tl.constexpr):
    """fp32 of loaded scales; bf16 of powers of two, where that is the type of the numbers: all products are exact."""
    if columns.weight.decoding.data.dtype.element_ty != tl.uint8:
        return scales.to(tl.float32)
    elif columns.weight.decoding.HAS_GLOBAL:
        return e4m3_values(scales) * global_scale
    elif DTYPE.is_bf16():
        return e8m0_values(scales).to(tl.bfloat16)
    else:
        return e8m0_values(scales)


@triton.jit
def decode_columns(
    columns, start, size_k, scales, global_scale, DTYPE: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr
):
    """[BLOCK_K, HALVES * WIDTH] of DTYPE from k = `start` on by quantised `Columns`; 0 past size_k. EVEN_K: all is.

    scales, global_scale: of `load_scales` at the same `start`, and of `load_global_scale`.
    """
    PER_K: tl.constexpr = columns.weight.decoding.PER_K
    PER_N: tl.constexpr = columns.weight.decoding.PER_N
    ROWS: tl.constexpr = BLOCK_K // PER_K
    WIDTH: tl.constexpr = columns.HALVES * columns.WIDTH // PER_N
    n, inside_n = number_columns(columns, PER_N)
    k = start // PER_K + tl.arange(0, ROWS)
    cells = columns.weight.data + columns.expert.to(tl.int64) * columns.weight.stride_e
    cells += n.to(tl.int64)[None, :] * columns.weight.stride_n + k.to(tl.int64)[:, None] * columns.weight.stride_k
    mask = inside_n[None, :]
    if not EVEN_K:
        mask = mask & (k < tl.cdiv(size_k, PER_K))[:, None]
    words = tl.load(cells, mask=mask, other=0).to(tl.uint32, bitcast=True)
    factor = spread(factors(columns, scales[0], global_scale, DTYPE), ROWS, WIDTH)
    if columns.weight.decoding.VALUE != INTEGER:
        zeros = None
    elif columns.weight.decoding.HAS_ZEROS:
        zeros = spread(scales[1].to(tl.float16), ROWS, WIDTH)
    else:
        zeros = columns.weight.decoding.zero.to(tl.float16)
    return word_numbers(words, zeros, factor, PER_K, PER_N, columns.weight.decoding.VALUE, DTYPE)


@triton.jit
def decode_kernel(
    out,  # [E, k, columns]
    weight,  # per expert [k, columns], codes
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
    decoding = weight.decoding
    assert decoding is not None
    by_k = weight.strides[0] == 1
    size_k, size_columns = decoding.size
    num_experts = weight.data.shape[0]
    out = torch.empty(
        (num_experts, *(decoding.size[::-1] if by_k else decoding.size)), dtype=dtype, device=weight.data.device
    )
    strides = (1, size_k) if by_k else (size_columns, 1)
    block_k, block_n = DECODE_BLOCK if by_k else DECODE_BLOCK[::-1]
    if out.numel() > 0:
        decode_kernel[(cdiv(size_k, block_k), cdiv(size_columns, block_n), num_experts)](
            out, weight.weight(), *strides, size_k, size_columns, BLOCK_K=block_k, BLOCK_N=block_n
        )
    layout = layout_of(out.stride(0), strides, out.element_size(), out.element_size())
    return PerExpert(out, layout, (out,), weight.adapter)
