"""What the grouped GEMM kernels share: the order of tiles, the experts' matrices, the main loop, column splitting.

Every kernel of the family is persistent: a grid bounded by the device's size loops over tiles, up to a tile count that
is loaded on the device. Rows are gathered through pointers inside the main loop, so no copy of the hidden states is
made. The product accumulates in fp32 in the order of the contraction: same input, same bits. Sizes and strides that
are multiples of 16 elements are copied to shared memory asynchronously, 16 bytes at a time; others work, but slowly:
their copies go through registers one element at a time.

On Hopper and Blackwell stacked weights are read by tensor descriptors (TMA) instead: one thread asks for a whole tile,
so that the loop computes no addresses for it and keeps none in registers.

The proxy fence. On Hopper and Blackwell the matrix unit reads shared memory through the asynchronous proxy, while
cp.async writes it through the generic one; PTX asks for fence.proxy.async between the two. Triton emits it since
3.7.1 (pull requests 9610 and 10537 of triton-lang/triton); before that, its pipelined loop leaves it out. On Hopper
`proxy_fence` then puts it where 3.7.1 does: after the wait for the copies and the barrier, before the product. On
Blackwell the older pipeliner accepts no inline assembly in the loop, so `configs.pipeline_stages` turns pipelining
off there: copies then go through registers, for which every version emits the fence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_triton_kernels.configs import Config, Shipped

ExpertParameter = Tensor | Sequence[Tensor]


@dataclass(frozen=True, kw_only=True)
class PerExpert:
    """A parameter of every expert as a kernel reads it: one stacked tensor, or a table of addresses.

    data       the stacked tensor [E, ...], or an int64 [E] tensor of addresses on the device
    stride_e   elements from one expert to the next (0 for a table)
    strides    the strides of one expert's tensor, in elements
    alignment  bytes that divide every address of a table
    held       the tensors that the addresses point to, kept alive with this record
    """

    data: Tensor
    stride_e: int
    strides: tuple[int, ...]
    is_table: bool
    alignment: int
    held: tuple[Tensor, ...]

    def transposed(self) -> PerExpert:
        """The same matrices with their two dimensions swapped; nothing moves."""
        return PerExpert(
            data=self.data,
            stride_e=self.stride_e,
            strides=self.strides[::-1],
            is_table=self.is_table,
            alignment=self.alignment,
            held=self.held,
        )


@lru_cache(maxsize=1024)
def address_table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """The addresses as int64 [E] on the device. Kept, because a training step asks for the same ones every time."""
    return torch.tensor(addresses, dtype=torch.int64).to(device, non_blocking=True)


def per_expert(parameter: ExpertParameter) -> PerExpert:
    """Make a stacked parameter [E, ...] or a sequence of E equal-shaped tensors readable by a kernel.

    Nothing is copied, except the members of a sequence whose strides differ, which are made contiguous.
    """
    if isinstance(parameter, Tensor):
        return PerExpert(
            data=parameter,
            stride_e=parameter.stride(0),
            strides=parameter.stride()[1:],
            is_table=False,
            alignment=parameter.element_size(),
            held=(parameter,),
        )
    held = tuple(parameter)
    if any(tensor.stride() != held[0].stride() for tensor in held):
        held = tuple(tensor.contiguous() for tensor in held)
    addresses = tuple(tensor.data_ptr() for tensor in held)
    aligned = all(address % 16 == 0 for address in addresses)
    return PerExpert(
        data=address_table(addresses, held[0].device),
        stride_e=0,
        strides=held[0].stride(),
        is_table=True,
        alignment=16 if aligned else held[0].element_size(),
        held=held,
    )


def weight_argument(
    weight: PerExpert, config: Config, *, size_k: int, size_columns: int, halves: int, block_n: int
) -> tuple[Tensor | TensorDescriptor, dict[str, Any]]:
    """A weight, per expert [size_k, halves * size_columns], as `rows_times_weight` reads it, and its constants.

    A tensor descriptor where the configuration asks for it and the layout allows it: a stacked tensor in which k or
    the columns are contiguous, all else in steps of 16 bytes. It is [E, halves, columns, k] or [E, 1, k, columns], so
    that what lies past an expert's columns is read as 0 and never as the next expert's. Else the tensor or the table.
    """
    constants = {"WEIGHT_TABLE": weight.is_table, "WEIGHT_ALIGNMENT": weight.alignment, "DESCRIPTOR": None}
    stride_k, stride_n = weight.strides
    by_k = stride_k == 1
    row_stride = stride_n if by_k else stride_k
    rows, width = (size_columns, size_k) if by_k else (size_k, size_columns)
    item = weight.data.element_size()
    steps = (weight.stride_e, row_stride)
    if (
        not config.descriptors
        or weight.is_table
        or not (by_k or (stride_n == 1 and halves == 1))
        or weight.data.data_ptr() % 16 != 0
        or any(step * item % 16 != 0 for step in steps)
        or row_stride < width
        or weight.stride_e < halves * rows * row_stride
    ):
        return weight.data, constants
    block = [1, halves, block_n, config.block_k] if by_k else [1, 1, config.block_k, block_n]
    shape = [weight.data.shape[0], halves, rows, width]
    strides = [weight.stride_e, rows * row_stride, row_stride, 1]
    return TensorDescriptor(weight.data, shape, strides, block), {**constants, "DESCRIPTOR": "k" if by_k else "columns"}


@triton.jit
def expert_base(parameter, expert, stride_e, IS_TABLE: tl.constexpr, ALIGNMENT: tl.constexpr, DTYPE: tl.constexpr):
    """Pointer to one expert's tensor."""
    if IS_TABLE:
        base = tl.load(parameter + expert).to(tl.pointer_type(DTYPE))
        return tl.multiple_of(base, ALIGNMENT)
    else:
        return parameter + expert.to(tl.int64) * stride_e


@triton.jit
def add_bias(value, bias, columns, column_mask, stride, HAS_BIAS: tl.constexpr):
    """value [rows, columns] + one expert's bias [columns]."""
    if HAS_BIAS:
        return value + tl.load(bias + columns * stride, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    else:
        return value


@triton.jit
def tile_order(tile, num_rows, num_columns, GROUP: tl.constexpr):
    """Tile number -> (tile row, tile column): down GROUP rows, then on to the next column.

    The programs that run together then share both a few row blocks and a few column blocks in the L2 cache.
    """
    group_size = GROUP * num_columns
    first = tile // group_size * GROUP
    height = tl.minimum(num_rows - first, GROUP)
    inside = tile % group_size
    return first + inside % height, inside // height


@triton.jit
def proxy_fence(FENCE: tl.constexpr):
    """See the top of the file. The operand is only there because inline assembly needs one."""
    if FENCE:
        tl.inline_asm_elementwise(
            "fence.proxy.async.shared::cta; mov.u32 $0, $1;",
            "=r,r",
            [tl.program_id(0)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def rows_times_weight(
    row_pointers,
    weight,
    expert,
    n0,
    size_k,
    size_columns,
    stride_e,
    stride_k,
    stride_n,
    HALVES: tl.constexpr,
    IS_TABLE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    FENCE: tl.constexpr,
):
    """fp32 [BLOCK_M, HALVES * BLOCK_N]: rows, contiguous in k, times BLOCK_N columns from n0 on of one expert's weight.

    With HALVES 2 the weight [k, 2 * size_columns] has two halves, and these columns are taken of both, side by side.
    Every row pointer must be readable: a row that does not count points at some row that exists. Columns past
    size_columns come out as 0. The weight's arguments are those of `weight_argument`.
    """
    WIDTH: tl.constexpr = HALVES * BLOCK_N
    k = tl.arange(0, BLOCK_K)
    a_pointers = row_pointers[:, None] + k[None, :]
    if DESCRIPTOR is None:
        wide = tl.arange(0, WIDTH)
        if HALVES == 1:
            columns = n0 + wide
            column_mask = columns < size_columns
        else:
            inner = n0 + wide % BLOCK_N
            columns = wide // BLOCK_N * size_columns + inner
            column_mask = inner < size_columns
        w = expert_base(weight, expert, stride_e, IS_TABLE, ALIGNMENT, row_pointers.dtype.element_ty)
        b_pointers = (w + columns.to(tl.int64) * stride_n)[None, :] + k[:, None].to(tl.int64) * stride_k
        step_k = tl.full([], BLOCK_K, tl.int64) * stride_k
    acc = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
    for block in tl.range(0, tl.cdiv(size_k, BLOCK_K)):
        inside = k < size_k - block * BLOCK_K
        if EVEN_K:
            a = tl.load(a_pointers)
        else:
            a = tl.load(a_pointers, mask=inside[None, :], other=0.0)
        if DESCRIPTOR == "k":
            b = tl.trans(weight.load([expert, 0, n0, block * BLOCK_K]).reshape(WIDTH, BLOCK_K))
        elif DESCRIPTOR == "columns":
            b = weight.load([expert, 0, block * BLOCK_K, n0]).reshape(BLOCK_K, BLOCK_N)
        elif EVEN_K:
            b = tl.load(b_pointers, mask=column_mask[None, :], other=0.0)
        else:
            b = tl.load(b_pointers, mask=inside[:, None] & column_mask[None, :], other=0.0)
        proxy_fence(FENCE)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_pointers += BLOCK_K
        if DESCRIPTOR is None:
            b_pointers += step_k
    return acc


@triton.jit
def halves(x):
    """Left and right half of the columns; stays in registers where a thread holds both."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def split_columns(x, PARTS: tl.constexpr):
    """A tuple of 1, 2 or 4 column blocks, left to right: an epilogue that takes one at a time needs fewer registers."""
    if PARTS == 1:
        return (x,)
    elif PARTS == 2:
        left, right = halves(x)
        return (left, right)
    else:
        left, right = halves(x)
        first, second = halves(left)
        third, fourth = halves(right)
        return (first, second, third, fourth)


def offline_weight(
    shipped: Shipped, *, addresses: bool, by_k: bool, block_n: int, halves: int = 1
) -> tuple[str, dict[str, Any]]:
    """Triton's type of a weight of aligned sizes, and its constants: what `weight_argument` makes of it on a GPU."""
    constants = {"WEIGHT_TABLE": addresses, "WEIGHT_ALIGNMENT": 16, "DESCRIPTOR": None}
    if addresses:
        return "*i64", constants
    if not shipped.config.descriptors or not (by_k or halves == 1):
        return f"*{shipped.dtype}", constants
    block_k = shipped.config.block_k
    block = [1, halves, block_n, block_k] if by_k else [1, 1, block_k, block_n]
    return f"tensordesc<{shipped.dtype}{block}>", {**constants, "DESCRIPTOR": "k" if by_k else "columns"}
