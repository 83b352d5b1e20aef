"""One product per expert over the rows of a dispatch, which lie in expert order.

`F.grouped_mm` computes them in one call where it may (`can_group`). Elsewhere each expert multiplies its own rows, for
which the host reads the offsets once. Where it cannot (on the meta device, and while a CUDA graph is captured) every
expert multiplies all S rows and keeps its own, which is E times the work.
"""

from __future__ import annotations

import functools
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton.reference import wide

FIXED_ROWS = 128  # of each product where a row's bits must not depend on how many there are


class GroupedRows:
    """Which expert each of S rows belongs to, computed where it is asked for; offsets [E+1] int32."""

    def __init__(self, offsets: Tensor, num_rows: int, *, by_row: bool = False) -> None:
        self.offsets, self.num_rows, self.num_experts = offsets, num_rows, offsets.shape[0] - 1
        self.by_row = by_row  # the bits of a product's row depend on this row alone
        self.ends = offsets[1:].contiguous()

    @functools.cached_property
    def _found_S(self) -> Tensor:
        """[S] the row's expert; E past offsets[E]."""
        row_S = torch.arange(self.num_rows, device=self.ends.device, dtype=self.ends.dtype)
        return torch.searchsorted(self.ends, row_S, right=True)

    @functools.cached_property
    def expert_S(self) -> Tensor:
        """[S] the row's expert; past offsets[E] the last."""
        return self._found_S.clamp_max(self.num_experts - 1)

    @functools.cached_property
    def kept_S1(self) -> Tensor:
        """[S, 1] whether the row is before offsets[E]."""
        return (self._found_S < self.num_experts)[:, None]

    def of(self, expert: int) -> Tensor:
        """[S, 1] whether the row is this expert's."""
        return (self._found_S == expert)[:, None]

    @property
    def are_readable(self) -> bool:
        """Whether the host can read the offsets."""
        capturing = self.offsets.is_cuda and torch.cuda.is_current_stream_capturing()
        return not (self.offsets.is_meta or capturing)

    @functools.cached_property
    def ranges(self) -> list[tuple[int, slice]]:
        """(expert, its rows) of the experts that have some; a host sync where the offsets are on a GPU."""
        bounds = enumerate(pairwise(self.offsets.tolist()))
        return [(e, slice(start, end)) for e, (start, end) in bounds if start < end]


def can_group(left: Tensor, right: Tensor) -> bool:
    """Return whether `F.grouped_mm` takes these on a GPU and computes them with no host sync.

    That is so for bf16 on NVIDIA GPUs of compute capability 9.x and 10.x. On others, in other dtypes and on AMD GPUs
    torch copies the offsets to the host and loops over the experts: `_grouped_mm_fallback` in
    ATen/native/GroupedMMUtils.h, the same in 2.11.0, 2.13.0 and 2.14.1; `_grouped_mm_cuda` in cuda/GroupedBlas.cpp
    chooses, read in copies from before and after cuBLASLt came to it. With that, 2.14 built with CUDA 13.3 also
    computes fp16 in one call, which we leave. torch raises for a pointer or a row's stride that is not a multiple of 16
    bytes, 2.14 also for an expert's stride, which 2.11 and 2.13 let pass.
    """
    return (
        left.is_cuda
        and left.dtype == right.dtype == torch.bfloat16
        and _has_grouped_kernel(left.device)
        and all(_is_aligned(x) and x.data_ptr() % 16 == 0 for x in (left, right))
    )


@functools.cache
def _has_grouped_kernel(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)


def _is_aligned(x: Tensor) -> bool:
    """Return whether [S, N] or [E, M, N] has elements, sizes M and N of 16 bytes each or a multiple, and such strides.

    One of the last two strides is 1.
    """
    quantum = 16 // x.element_size()
    *outer, row_step, column_step = x.stride()
    step, dense, length = (row_step, 1, x.shape[-1]) if column_step == 1 else (column_step, row_step, x.shape[-2])
    sizes_and_strides = (*x.shape[1:], *outer, step)
    return x.numel() > 0 and dense == 1 and step >= length and all(n % quantum == 0 for n in sizes_and_strides)


def grouped_product(x_SI: Tensor, weight_EIO: Tensor, rows: GroupedRows) -> Tensor:
    """Compute x[s] @ weight[expert of s] for every row, [S, O]; rows past offsets[E] are arbitrary."""
    if can_group(x_SI, weight_EIO) and not rows.by_row:
        return F.grouped_mm(x_SI, weight_EIO, offs=rows.ends)
    out_SO = x_SI.new_zeros(rows.num_rows, weight_EIO.shape[2])
    if rows.are_readable:
        for e, part in rows.ranges:
            if rows.by_row:
                out_SO[part] = product_by_row(x_SI[part], weight_EIO[e])
            else:
                torch.mm(x_SI[part], weight_EIO[e], out=out_SO[part])
        return out_SO
    product = product_by_row if rows.by_row else torch.mm
    for e, weight_IO in enumerate(weight_EIO.unbind(0)):
        out_SO = torch.where(rows.of(e), product(x_SI, weight_IO), out_SO)
    return out_SO


def product_by_row(x_mI: Tensor, weight_IO: Tensor) -> Tensor:
    """Compute x @ weight, FIXED_ROWS at a time, such that a row's bits depend on this row alone, [m, O].

    A library chooses its kernel, and with it the order of the sums, by a product's sizes.
    """
    padded = F.pad(x_mI, (0, 0, 0, -x_mI.shape[0] % FIXED_ROWS))
    return torch.cat([piece @ weight_IO for piece in padded.split(FIXED_ROWS)])[: x_mI.shape[0]]


def grouped_outer(left_SM: Tensor, right_SN: Tensor, rows: GroupedRows) -> Tensor:
    """Sum left x right over each expert's rows, [E, M, N]; those past offsets[E] do not count."""
    if can_group(left_SM, right_SN):
        return F.grouped_mm(left_SM.T, right_SN, offs=rows.ends)
    if rows.are_readable:
        out_EMN = left_SM.new_zeros(rows.num_experts, left_SM.shape[1], right_SN.shape[1])
        for e, part in rows.ranges:
            torch.mm(left_SM[part].T, right_SN[part], out=out_EMN[e])
        return out_EMN
    # Both factors are masked, since zero times another expert's infinity is not zero.
    is_of_e = [rows.of(e) for e in range(rows.num_experts)]
    return torch.stack([torch.where(m, left_SM, 0).T @ torch.where(m, right_SN, 0) for m in is_of_e])


def sum_per_expert(values_SN: Tensor, rows: GroupedRows) -> Tensor:
    """Sum each expert's rows, [E, N]; those past offsets[E] do not count."""
    ones_S8 = values_SN.new_ones(rows.num_rows, 8)  # 8 is the fewest columns that grouped_mm takes in bf16
    if not rows.are_readable or can_group(ones_S8, values_SN):
        return grouped_outer(ones_S8, values_SN, rows)[:, 0].contiguous()
    out_EN = values_SN.new_zeros(rows.num_experts, values_SN.shape[1])
    for e, part in rows.ranges:
        out_EN[e] = values_SN[part].sum(0, dtype=wide(values_SN.dtype))
    return out_EN
