"""Products in fp8 as DeepSeek-V3 trains (arXiv 2412.19437, section 3.3): their operands, and the scales in a kernel.

A code is a float8_e4m3fn, and 128 or 128 x 128 of them share a scale in fp32: max |x| / 448 of those that it stands
for, or 1 where that is below 2^-126. code = x / scale, rounded to the nearest, ties to even, so x is about code *
scale. A NaN or an infinity makes the whole group NaN. `quantize` makes

    `RowCodes`     groups of 128 along a row: an operand that is contracted along its rows
    `WeightCodes`  blocks of 128 x 128 of the experts' matrices; one scale serves both directions
    `ColumnCodes`  groups of 128 of an expert's rows, from its first one on, for each column: both sides of a
                   gradient of the experts' matrices

The matrix unit of Hopper reads codes that are contiguous along the contraction only. So ColumnCodes are transposed,
WeightCodes are written once for each direction, and all are padded with zeros to a multiple of 128 along the
contraction, where nothing is masked then.

A product adds the scaled partial sum of each 128 of the contraction in fp32 (`grouped_gemm.rows_times_weight`), because
Hopper's own sums of codes have about 14 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, final

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.arithmetic import cdiv
from moe_triton_kernels.compiler import triton_version
from moe_triton_kernels.launch import BLACKWELL, HOPPER
from moe_triton_kernels.operands import PerExpert

CODES = torch.float8_e4m3fn
GROUP = tl.constexpr(128)
# elsewhere fp8 is emulated: no products of e4m3 (sm_80, gfx942), or none whose binaries are gated (sm_89, sm_120)
ARCHITECTURES = (*HOPPER, *BLACKWELL, "interpreter")
TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def fp8_supported(architecture: str) -> bool:
    """Return whether kernels multiply codes on this architecture ("sm_90", "gfx942", "interpreter", ...)."""
    return architecture in ARCHITECTURES


def makes_codes(
    architecture: str, *, by_rows: bool, pairs: bool = False, sums: bool = False, gated: bool = True
) -> bool:
    """Return whether `d_hidden` makes codes by columns, or with them by rows of dH.

    pairs: gate and up alternate. sums: beside the codes, those of the columns of dH are written.

    By rows it spills on Blackwell (200 bytes a thread and more by Triton 3.7.1), by 3.8 with sums (104) and where
    there is no gate (8), and by 3.9 (32); by columns it spills on Blackwell by 3.8 (64). With both it spills with pairs
    (8 by 3.6, 104 by 3.8), and by 3.6.
    """
    version = triton_version()[:2]
    is_newer = version > (3, 7)
    by_rows_spills = architecture in BLACKWELL or version > (3, 8) or (is_newer and (sums or not gated))
    spills = pairs or (by_rows and by_rows_spills)
    return not spills and version >= (3, 7) and not (is_newer and architecture in BLACKWELL)


def padded(size: int) -> int:
    """`size` rounded up to whole groups."""
    return cdiv(size, GROUP.value) * GROUP.value


@final  # so that none is a Tensor
@dataclass(frozen=True, kw_only=True)
class RowCodes:
    """Rows [R, size] in groups of 128 along each row.

    codes   [R, padded size] float8_e4m3fn; those past the size are 0
    scales  [R, padded size / 128] fp32
    dtype   of the rows
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    @classmethod
    def empty(cls, num_rows: int, size: int, dtype: torch.dtype, device: torch.device) -> RowCodes:
        width = padded(size)
        return cls(
            codes=torch.empty((num_rows, width), dtype=CODES, device=device),
            scales=torch.empty((num_rows, width // GROUP.value), dtype=torch.float32, device=device),
            dtype=dtype,
        )

    def argument(self) -> RowsArgument:
        return RowsArgument(self.codes, self.scales, self.codes.shape[1])


@dataclass(frozen=True, kw_only=True)
class ColumnCodes:
    """Rows [S, size] in expert order, for each column in groups of 128 of an expert's rows, transposed.

    codes   [size, 128 * tiles] float8_e4m3fn: those of tile t (of 128 rows in `TileTables`) from 128 * t on; those past
            an expert's last row are 0
    scales  [tiles, size] fp32
    dtype   of the rows
    sums    [tiles, size] fp32: of each tile's rows as they are before rounding to codes, for the gradient of a bias
            (`d_bias` adds up an expert's tiles); None where nothing reads them

    None is written past the number of tiles.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype
    sums: Tensor | None = None

    @classmethod
    def empty(
        cls, size: int, num_tiles: int, dtype: torch.dtype, device: torch.device, *, sums: bool = False
    ) -> ColumnCodes:
        scales = torch.empty((num_tiles, size), dtype=torch.float32, device=device)
        return cls(
            codes=torch.empty((size, num_tiles * GROUP.value), dtype=CODES, device=device),
            scales=scales,
            dtype=dtype,
            sums=torch.empty_like(scales) if sums else None,
        )

    def argument(self) -> ColumnsArgument:
        return ColumnsArgument(self.codes, self.scales, self.codes.shape[1], self.sums)


@final
@dataclass(frozen=True, kw_only=True)
class CodedRows:
    """Rows [S, size] in expert order in every form in which they are read; None for one that is not made.

    numbers   [S, size] in their dtype
    rows      for a product with a projection
    columns   for a gradient of one
    gathered  the other side of that gradient: the tokens' rows in expert order
    """

    numbers: Tensor | None = None
    rows: RowCodes | None = None
    columns: ColumnCodes | None = None
    gathered: ColumnCodes | None = None

    def argument(self) -> WrittenArgument:
        rows, columns = (None if codes is None else codes.argument() for codes in (self.rows, self.columns))
        return WrittenArgument(self.numbers, rows, columns)


@dataclass(frozen=True, kw_only=True)
class WeightCodes:
    """The experts' matrices [k, columns] in blocks of 128 x 128, as the products of both directions read them.

    forward   for rows [., k] times the matrices: codes [E, columns, padded k]
    backward  for rows [., columns] times their transposes: codes [E, k, padded columns]
    """

    forward: PerExpert
    backward: PerExpert


class RowsArgument(NamedTuple):
    """RowCodes that a kernel writes, among its arguments: codes [R, width] and scales.

    It has no field that may be None: Triton 3.6 cannot hand such a record on from one function to the next.
    """

    codes: Any
    scales: Any
    width: Any


class ColumnsArgument(NamedTuple):
    """ColumnCodes that a kernel writes, among its arguments: codes [size, width], scales, and any sums."""

    codes: Any
    scales: Any
    width: Any
    sums: Any


class WrittenArgument(NamedTuple):
    """CodedRows that a kernel writes, among its arguments: a pointer, RowsArgument, ColumnsArgument; None: not made."""

    numbers: Any
    rows: Any
    columns: Any


class ScalesArgument(NamedTuple):
    """The scales of a product's operands among a kernel's arguments.

    rows                          pointer to [R, blocks of k]
    weight                        pointer to [E, blocks of k, blocks of columns]
    stride_e, stride_k, stride_n  its strides
    EVEN                          128 divides the columns (of each half, where there are two)
    DTYPE                         Triton's type of what the rows' codes stand for
    """

    rows: Any
    weight: Any
    stride_e: Any
    stride_k: Any
    stride_n: Any
    EVEN: Any
    DTYPE: Any


Operand = TypeVar("Operand", Tensor, RowCodes)


def operand_of(rows: Tensor | RowCodes, weight: PerExpert, size_columns: int) -> tuple[Tensor, ScalesArgument | None]:
    """The matrix that a product reads as its left side, and the scales of both sides where they are codes.

    ValueError where one side is codes and the other is not.
    """
    if isinstance(rows, Tensor) and weight.scales is None:
        return rows, None
    if isinstance(rows, Tensor) or weight.scales is None:
        kinds = ("rows", "codes") if isinstance(rows, Tensor) else ("codes", "rows")
        raise ValueError("weight: got {1} together with {0}, wanted codes for codes".format(*kinds))
    constants = (size_columns % GROUP.value == 0, TRITON_TYPES[rows.dtype])
    return rows.codes, ScalesArgument(
        rows.scales, weight.scales, *weight.scales.stride(), *map(tl.constexpr, constants)
    )


def new_rows(like: Operand, num_rows: int, size: int, *, keep: bool) -> Operand:
    """Memory for rows [num_rows, size] of the same kind and dtype; empty where they are not kept."""
    if isinstance(like, Tensor):
        return like.new_empty(num_rows, size) if keep else like.new_empty(0)
    return RowCodes.empty(num_rows if keep else 0, size, like.dtype, like.codes.device)


class Scales(NamedTuple):
    """The scales of a product of codes in a kernel: a ScalesArgument or None, and the numbers of the rows [BLOCK_M].

    PRESENT is whether there are any: see `lora.Added`.
    """

    argument: Any
    rows: Any
    PRESENT: Any


@triton.jit
def start_scales(scales, columns, size_k):
    """Pointers to the scales of the first 128 of k: of the rows [BLOCK_M], and of the expert's first block."""
    rows = scales.argument.rows + scales.rows.to(tl.int64) * (size_k // GROUP)
    return rows, scales.argument.weight + columns.expert.to(tl.int64) * scales.argument.stride_e


@triton.jit
def load_column_scales(at, stride_n, columns, EVEN: tl.constexpr):
    """The scales of the columns in one block of k, whose first scale is at `at`: a number, or [1, columns] of them.

    The columns lie in at most three blocks, since their first one is a multiple of the tile's width: numbers that every
    thread has take no registers of the accumulator's size.
    """
    WIDE: tl.constexpr = columns.HALVES * columns.WIDTH
    tl.static_assert(columns.WIDTH % GROUP == 0 or (columns.HALVES == 1 and GROUP % columns.WIDTH == 0))
    tl.static_assert(WIDE <= 2 * GROUP)
    left = tl.load(at + columns.first // GROUP * stride_n)
    if WIDE <= GROUP:
        return left
    else:
        end = columns.size * columns.HALVES
        second = columns.first + (columns.size if columns.HALVES == 2 else GROUP)
        block = second // GROUP
        right = tl.load(at + block * stride_n, mask=second < end, other=0.0)
        wide = tl.arange(0, WIDE)
        if columns.HALVES == 2 and not EVEN:
            beyond = tl.load(at + (block + 1) * stride_n, mask=(block + 1) * GROUP < end, other=0.0)
            right = tl.where(wide < (block + 2) * GROUP - second, right, beyond)
        return tl.where(wide < GROUP, left, right)[None, :]
