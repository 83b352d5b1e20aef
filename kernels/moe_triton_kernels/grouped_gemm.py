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
Blackwell the older pipeliner accepts no inline assembly in the loop, so `launch.pipeline_stages` turns pipelining
off there: copies then go through registers, for which every version emits the fence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_triton_kernels.address_tables import address_table
from moe_triton_kernels.launch import Config

ExpertParameter = Tensor | Sequence[Tensor]


class WeightArgument(NamedTuple):
    """The experts' matrices [k, columns] among a kernel's arguments.

    data          pointer to the stacked tensor, or to the int64 addresses of the experts' own
    stride_e      elements from one expert to the next (0 for addresses)
    ALIGNMENT     bytes that divide every address
    K_CONTIGUOUS  stride_k is 1
    """

    data: Any
    stride_e: Any
    stride_k: Any
    stride_n: Any
    ALIGNMENT: Any
    K_CONTIGUOUS: Any


class BiasArgument(NamedTuple):
    """The experts' biases [columns] among a kernel's arguments; the fields are those of `WeightArgument`."""

    data: Any
    stride_e: Any
    stride_n: Any
    ALIGNMENT: Any


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
    alignment: int
    held: tuple[Tensor, ...]

    @property
    def is_table(self) -> bool:
        return self.data.dtype == torch.int64

    def transposed(self) -> PerExpert:
        """The same matrices with their two dimensions swapped; nothing moves."""
        return replace(self, strides=self.strides[::-1])

    def weight(self) -> WeightArgument:
        stride_k, stride_n = self.strides
        constants = (tl.constexpr(self.alignment), tl.constexpr(stride_k == 1))
        return WeightArgument(self.data, self.stride_e, stride_k, stride_n, *constants)

    def bias(self) -> BiasArgument:
        (stride_n,) = self.strides
        return BiasArgument(self.data, self.stride_e, stride_n, tl.constexpr(self.alignment))


def per_expert(parameter: ExpertParameter) -> PerExpert:
    """Make a stacked parameter [E, ...] or a sequence of E equal-shaped tensors readable by a kernel.

    Nothing is copied, except the members of a sequence whose strides differ, which are made contiguous.
    """
    if isinstance(parameter, Tensor):
        return PerExpert(
            data=parameter,
            stride_e=parameter.stride(0),
            strides=parameter.stride()[1:],
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
        alignment=16 if aligned else held[0].element_size(),
        held=held,
    )


def weight_descriptor(
    weight: PerExpert, config: Config, *, size_k: int, size_columns: int, halves: int, block_n: int
) -> TensorDescriptor | None:
    """A weight, per expert [size_k, halves * size_columns], as a descriptor; None where it is read by pointers.

    A descriptor where the configuration asks for it and the layout allows it: a stacked tensor in which k or the
    columns are contiguous, all else in steps of 16 bytes. It is [E, halves, columns, k] or [E, 1, k, columns], so that
    what lies past an expert's columns is read as 0 and never as the next expert's. It is an argument of its own: the
    launcher makes descriptors of arguments only, not of what is within a tuple.
    """
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
        return None
    shape = [weight.data.shape[0], halves, rows, width]
    strides = [weight.stride_e, rows * row_stride, row_stride, 1]
    return TensorDescriptor(weight.data, shape, strides, descriptor_block(config, by_k, halves, block_n))


def descriptor_block(config: Config, by_k: bool, halves: int, block_n: int) -> list[int]:
    """What one load of a weight's descriptor brings."""
    return [1, halves, block_n, config.block_k] if by_k else [1, 1, config.block_k, block_n]


@triton.jit
def expert_base(parameter, expert, DTYPE: tl.constexpr):
    """Pointer to one expert's tensor; `parameter` is a WeightArgument or a BiasArgument."""
    if parameter.data.dtype.element_ty == tl.int64:
        base = tl.load(parameter.data + expert).to(tl.pointer_type(DTYPE))
        return tl.multiple_of(base, parameter.ALIGNMENT)
    else:
        return parameter.data + expert.to(tl.int64) * parameter.stride_e


@triton.jit
def add_bias(value, bias, base, columns, column_mask):
    """value [rows, columns] + one expert's bias [columns], at `base`; value itself where there is no bias."""
    if bias is None:
        return value
    else:
        return value + tl.load(base + columns * bias.stride_n, mask=column_mask, other=0.0).to(tl.float32)[None, :]


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
    descriptor,
    expert,
    n0,
    size_k,
    size_columns,
    HALVES: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN_K: tl.constexpr,
    TILE,
):
    """fp32 [BLOCK_M, HALVES * COLUMNS]: rows, contiguous in k, times COLUMNS columns from n0 on of one expert's weight.

    With HALVES 2 the weight [k, 2 * size_columns] has two halves, and these columns are taken of both, side by side.
    Every row pointer must be readable: a row that does not count points at some row that exists. Columns past
    size_columns come out as 0. `descriptor` is that of `weight_descriptor`, or None.
    """
    WIDTH: tl.constexpr = HALVES * COLUMNS
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    k = tl.arange(0, BLOCK_K)
    a_pointers = row_pointers[:, None] + k[None, :]
    if descriptor is None:
        wide = tl.arange(0, WIDTH)
        if HALVES == 1:
            columns = n0 + wide
            column_mask = columns < size_columns
        else:
            inner = n0 + wide % COLUMNS
            columns = wide // COLUMNS * size_columns + inner
            column_mask = inner < size_columns
        w = expert_base(weight, expert, row_pointers.dtype.element_ty)
        b_pointers = (w + columns.to(tl.int64) * weight.stride_n)[None, :] + k[:, None].to(tl.int64) * weight.stride_k
        step_k = tl.full([], BLOCK_K, tl.int64) * weight.stride_k
    acc = tl.zeros((TILE.BLOCK_M, WIDTH), dtype=tl.float32)
    for block in tl.range(0, tl.cdiv(size_k, BLOCK_K)):
        inside = k < size_k - block * BLOCK_K
        if EVEN_K:
            a = tl.load(a_pointers)
        else:
            a = tl.load(a_pointers, mask=inside[None, :], other=0.0)
        if descriptor is not None:
            if weight.K_CONTIGUOUS:
                b = tl.trans(descriptor.load([expert, 0, n0, block * BLOCK_K]).reshape(WIDTH, BLOCK_K))
            else:
                b = descriptor.load([expert, 0, block * BLOCK_K, n0]).reshape(BLOCK_K, COLUMNS)
        elif EVEN_K:
            b = tl.load(b_pointers, mask=column_mask[None, :], other=0.0)
        else:
            b = tl.load(b_pointers, mask=inside[:, None] & column_mask[None, :], other=0.0)
        proxy_fence(TILE.FENCE)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_pointers += BLOCK_K
        if descriptor is None:
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
