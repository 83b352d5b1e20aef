"""fp8 by groups: e4m3 codes that share one fp32 scale, as DeepSeek-V3 (arXiv 2412.19437, section 3.3) uses them.

A group is rows x columns numbers: 1 x 128 of an operand along the contraction, 128 x 128 of a projection, 128 x 1 where
rows are contracted. The last group of a row or column may be short.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton.quantization.formats import E4M3_MAX

GROUP = 128


def quantize(x: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return the codes [..., R, C] float8_e4m3fn of x, and the scales [..., ceil(R/rows), ceil(C/columns)] fp32.

    scale = amax / 448 of a group, and 1 where that is 0; code = x / scale rounded to the nearest, ties to even. Both
    are computed in fp32. A NaN or an infinity makes all numbers of its group NaN.
    """
    size_r, size_c = x.shape[-2:]
    blocks = _blocks(x.float(), rows, columns)
    scales = blocks.abs().amax((-3, -1)) / E4M3_MAX
    scales = torch.where(scales == 0, 1.0, scales)
    codes = (blocks / scales[..., :, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return _whole(codes, size_r, size_c), scales


def decode(codes: Tensor, scales: Tensor, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return code * scale in `dtype`, fp32 or fp64, [..., R, C]."""
    blocks = _blocks(codes.to(dtype), rows, columns) * scales[..., :, None, :, None]
    return _whole(blocks, *codes.shape[-2:])


def rounded(x: Tensor, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return what is left of x [..., R, C] when it is quantised, in `dtype`, fp32 or fp64."""
    return decode(*quantize(x, rows, columns), rows, columns, dtype)


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
