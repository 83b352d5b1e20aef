"""fp8 by groups: e4m3 codes that share a scale, and how the operands of products are cut into groups.

A group is rows x columns numbers. As DeepSeek-V3 (arXiv 2412.19437, section 3.3) cuts them, with scales in fp32:
1 x 128 of an operand along the contraction, 128 x 128 of a projection, 128 x 1 where rows are contracted. In MXFP8 (OCP
Microscaling Formats v1.0), with powers of two: 32 along the contraction of every operand. The last group of a row or
column may be short.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton.quantization.formats import E4M3_MAX, e8m0_above, scales_of

GROUP, MX_GROUP = 128, 32


@dataclass(frozen=True)
class Recipe:
    """How the operands of products are rounded.

    group        numbers along the contraction that share a scale
    block        rows of a projection, or columns, across the contraction that share it
    microscaled  scales are powers of two, in E8M0
    """

    group: int
    block: int
    microscaled: bool

    def rows(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Round x [R, C], which is contracted along its rows, in `dtype`, fp32 or fp64."""
        return rounded(x, 1, self.group, dtype, microscaled=self.microscaled)

    def columns(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Round x [R, C], of which the rows are summed."""
        return rounded(x, self.group, 1, dtype, microscaled=self.microscaled)

    def projection(self, weight: Tensor, contracted: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Round a matrix that is contracted along dimension 0 or 1."""
        sizes = (self.block, self.group) if contracted else (self.group, self.block)
        return rounded(weight, *sizes, dtype, microscaled=self.microscaled)


BLOCKWISE = Recipe(GROUP, GROUP, microscaled=False)
MXFP8 = Recipe(MX_GROUP, 1, microscaled=True)


def quantize(x: Tensor, rows: int, columns: int, *, microscaled: bool = False) -> tuple[Tensor, Tensor]:
    """Return the codes [..., R, C] float8_e4m3fn of x, and the scales [..., ceil(R/rows), ceil(C/columns)].

    scale = amax / 448 of a group in fp32, and 1 where that is less than 2^-126; microscaled: the power of two that is
    next above, as uint8 (`formats.e8m0_above`). code = x / scale rounded to the nearest, ties to even. All is computed
    in fp32. A NaN or an infinity makes all numbers of its group NaN.
    """
    size_r, size_c = x.shape[-2:]
    blocks = _blocks(x.float(), rows, columns)
    largest = blocks.abs().amax((-3, -1))
    scales = e8m0_above(largest) if microscaled else largest / E4M3_MAX
    scales = scales if microscaled else torch.where(scales < torch.finfo(torch.float32).tiny, 1.0, scales)
    codes = (blocks / scales_of(scales)[..., :, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return _whole(codes, size_r, size_c), scales


def decode(codes: Tensor, scales: Tensor, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return code * scale in `dtype`, fp32 or fp64, [..., R, C]."""
    blocks = _blocks(codes.to(dtype), rows, columns) * scales_of(scales)[..., :, None, :, None]
    return _whole(blocks, *codes.shape[-2:])


def rounded(
    x: Tensor, rows: int, columns: int, dtype: torch.dtype = torch.float32, *, microscaled: bool = False
) -> Tensor:
    """Return what is left of x [..., R, C] when it is quantised, in `dtype`, fp32 or fp64."""
    return decode(*quantize(x, rows, columns, microscaled=microscaled), rows, columns, dtype)


def _blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """View [..., R, C] as [..., R/rows, rows, C/columns, columns], filled up with zeros."""
    rows, columns = (min(group, max(size, 1)) for group, size in zip((rows, columns), x.shape[-2:], strict=True))
    missing_r, missing_c = -x.shape[-2] % rows, -x.shape[-1] % columns
    if missing_r or missing_c:
        x = F.pad(x, (0, missing_c, 0, missing_r))
    size_r, size_c = x.shape[-2:]
    return x.unflatten(-1, (size_c // columns, columns)).unflatten(-3, (size_r // rows, rows))


def _whole(blocks: Tensor, size_r: int, size_c: int) -> Tensor:
    """Return [..., R, C] of what `_blocks` gave."""
    return blocks.flatten(-2).flatten(-3, -2)[..., :size_r, :size_c]
