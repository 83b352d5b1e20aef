"""What the grouped GEMM kernels share: the order of tiles, the main loop, column splitting.

Every kernel of the family is persistent: a grid bounded by the device's size loops over tiles, up to a tile count that
is loaded on the device. Rows are gathered inside the main loop, so no copy of the hidden states is made (`operands`).
The product accumulates in fp32 in the order of the contraction: same input, same bits.

The proxy fence. On Hopper and Blackwell the matrix unit reads shared memory through the asynchronous proxy, while
cp.async writes it through the generic one; PTX asks for fence.proxy.async between the two. Triton emits it since
3.7.1 (pull requests 9610 and 10537 of triton-lang/triton); before that, its pipelined loop leaves it out. On Hopper
`proxy_fence` then puts it where 3.7.1 does: after the wait for the copies and the barrier, before the product. Not
where there is nothing to order: TMA writes through the asynchronous proxy, and mma.sync and fp32 products read through
the generic one. On Blackwell the older pipeliner accepts no inline assembly in the loop, so `launch.pipeline_stages`
turns pipelining off there: copies then go through registers, for which every version emits the fence.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_triton_kernels.fp8 import GROUP, load_column_scales, start_scales
from moe_triton_kernels.lora import add_product, add_steps, load_step
from moe_triton_kernels.operands import load_columns, load_rows, number_columns, start_columns, start_rows
from moe_triton_kernels.quantized import decode_columns, load_global_scale, load_scales


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
def rows_times_weight(rows, columns, added, scales, size_k, DTYPE: tl.constexpr, EVEN_K: tl.constexpr, TILE):
    """fp32 [BLOCK_M, HALVES * WIDTH]: the product of `Rows` and `Columns`, size_k the contraction.

    added: what is `Added` to it by an adapter, in DTYPE. scales: the `Scales` of operands that are codes of 8 bits.
    """
    BLOCK_K: tl.constexpr = TILE.BLOCK_K
    BY_TMA: tl.constexpr = rows.descriptor is not None and columns.descriptor is not None
    numbers, column_mask = number_columns(columns)
    a_at = start_rows(rows, BLOCK_K)
    if columns.weight.QUANTIZED:
        # scales come a step ahead: there are too few of them in a block for asynchronous copies
        code_scales = load_scales(columns, 0, size_k, BLOCK_K)
        global_scale = load_global_scale(columns)
    else:
        b_at, b_step = start_columns(columns, numbers, DTYPE, BLOCK_K)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((TILE.BLOCK_M, columns.HALVES * columns.WIDTH), dtype=tl.float32)
    if added.PRESENT:
        # a short step is loaded before the loop, during which it arrives; a long one would need too many registers, and
        # on Triton 3.6 the only one in fp32
        IS_CHEAP: tl.constexpr = DTYPE.primitive_bitwidth == 16 or added.adapter.STEPS > 1
        AHEAD: tl.constexpr = 1 if added.adapter.BLOCK <= 32 and IS_CHEAP else 0
        if AHEAD:
            t, factor = load_step(added, 0, columns, numbers, column_mask, DTYPE)
    if scales.PRESENT:
        tl.static_assert(BLOCK_K == GROUP)
        row_scales, block_scales = start_scales(scales, columns, size_k)
        stride_k, stride_n = scales.argument.stride_k, scales.argument.stride_n
        EVEN: tl.constexpr = scales.argument.EVEN
    for block in tl.range(0, tl.cdiv(size_k, BLOCK_K)):
        inside = k < size_k - block * BLOCK_K
        a = load_rows(rows, a_at, inside, EVEN_K)
        if columns.weight.QUANTIZED:
            b = decode_columns(columns, block * BLOCK_K, size_k, code_scales, global_scale, DTYPE, EVEN_K, BLOCK_K)
            code_scales = load_scales(columns, (block + 1) * BLOCK_K, size_k, BLOCK_K)
        else:
            b = load_columns(columns, b_at, inside, column_mask, EVEN_K, BLOCK_K)
            b_at += b_step
        if scales.PRESENT:
            row_scale = tl.load(row_scales + block)
            column_scale = load_column_scales(block_scales + block * stride_k, stride_n, columns, EVEN)
            proxy_fence(TILE.FENCE and not BY_TMA)
            acc += tl.dot(a, b) * (row_scale[:, None] * column_scale)
        else:
            proxy_fence(TILE.FENCE and DTYPE.primitive_bitwidth == 16 and not BY_TMA)
            acc = tl.dot(a, b, acc, input_precision="ieee")
        a_at += BLOCK_K
    if added.PRESENT:
        if AHEAD:
            acc = add_product(acc, t, factor)
        acc = add_steps(acc, added, AHEAD, columns, numbers, column_mask, DTYPE)
    return acc


@triton.jit
def halves(x):
    """Left and right half of the columns; stays in registers where a thread holds both."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def split_columns(x, PARTS: tl.constexpr):
    """PARTS (a power of two) column blocks, left to right: an epilogue of one at a time needs few registers."""
    if PARTS == 1:
        return (x,)
    elif PARTS == 2:
        left, right = halves(x)
        return (left, right)
    elif PARTS == 4:
        left, right = halves(x)
        first, second = halves(left)
        third, fourth = halves(right)
        return (first, second, third, fourth)
    else:
        left, right = halves(x)
        return split_columns(left, PARTS // 2) + split_columns(right, PARTS // 2)
