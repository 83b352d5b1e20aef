"""LoRA adapters (arXiv 2106.09685): products whose one side is an adapter's rank.

With factors A [r, in] and B [out, r] per expert and s the scaling, a product of rows by W is x W^T + t B^T with
t = s x A^T, and the gradient of its input is dy W + u A with u = s dy B. The kernel `narrow` computes t and u, [S, r]:
it reads the rows once. The wide part is added by the kernel that multiplies the rows by W, as more steps of its
contraction (`add_steps`), so that nothing of [S, out] is written twice. The adapters' gradients, dA = u^T x and
dB = dy^T t, are products of `d_weight`.

The rank is padded to a power of two, 16 at least as the matrix unit wants, or to a multiple of MOST_RANK: t and u have
as many columns, and those past the rank are zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.arithmetic import next_power_of_2
from moe_triton_kernels.operands import Columns, PerExpert, in_units, start_columns, unit_of

MOST_RANK = 64


def rank_block(rank: int) -> int:
    """Columns of a tile of `narrow`, of which t and u have a multiple."""
    return min(MOST_RANK, max(16, next_power_of_2(rank)))


def step_block(rank: int, itemsize: int) -> int:
    """The rank that a step of the contraction takes; in fp32, whose products need more registers, the least."""
    return 16 if itemsize == 4 else rank_block(rank)


class AdapterArgument(NamedTuple):
    """What an adapter adds to a product, among a kernel's arguments.

    t       [S, STEPS * BLOCK]
    factor  WeightArgument: per expert [rank, columns]
    UNIT    elements that divide the rank (see `unit_of`)
    """

    t: Any
    factor: Any
    rank: Any
    UNIT: Any
    BLOCK: Any
    STEPS: Any


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """t [S, width] of `narrow`, and the factor that it is multiplied by, per expert [rank, columns]."""

    t: Tensor
    factor: PerExpert
    rank: int

    def argument(self) -> AdapterArgument:
        block = step_block(self.rank, self.t.element_size())
        constants = (unit_of(self.t.element_size(), self.rank), block, self.t.shape[1] // block)
        return AdapterArgument(self.t, self.factor.weight(), self.rank, *map(tl.constexpr, constants))


class Added(NamedTuple):
    """What an adapter adds to a product in a kernel: an AdapterArgument or None, and the rows of t that it is read at.

    Rows outside `row_mask` add 0. PRESENT is whether there is an adapter. Within and after a loop, Triton 3.6 keeps the
    constants of a record that is inside another one only if that one has a constant of its own behind it.
    """

    adapter: Any
    rows: Any
    row_mask: Any
    PRESENT: Any


@triton.jit
def load_step(added, step, columns, numbers, column_mask, DTYPE: tl.constexpr):
    """t [BLOCK_M, BLOCK] at the rows, and the factor [BLOCK, .] at the columns of a product, of one step."""
    BLOCK: tl.constexpr = added.adapter.BLOCK
    k = step * BLOCK + tl.arange(0, BLOCK)
    t_rows = added.adapter.t + added.rows.to(tl.int64) * (added.adapter.STEPS * BLOCK)
    t = tl.load(t_rows[:, None] + k[None, :], mask=added.row_mask[:, None], other=0.0)
    first, stride = start_columns(
        Columns(added.adapter.factor, None, columns.expert, columns.first, columns.size, columns.HALVES, columns.WIDTH),
        numbers,
        DTYPE,
        BLOCK,
    )
    inside = k < in_units(added.adapter.rank, added.adapter.UNIT)
    return t, tl.load(first + step * stride, mask=inside[:, None] & column_mask[None, :], other=0.0)


@triton.jit
def add_product(acc, t, factor):
    """acc + t factor, of one step."""
    acc = tl.dot(t, factor, acc, input_precision="ieee")
    # of two warpgroups, one may still read for wgmma what the other one overwrites next
    if t.dtype.primitive_bitwidth == 16:
        tl.debug_barrier()
    return acc


@triton.jit
def add_steps(acc, added, FIRST: tl.constexpr, columns, numbers, column_mask, DTYPE: tl.constexpr):
    """acc + t factor, by the steps from FIRST on."""
    for step in tl.range(FIRST, added.adapter.STEPS, num_stages=1):
        t, factor = load_step(added, step, columns, numbers, column_mask, DTYPE)
        acc = add_product(acc, t, factor)
    return acc
