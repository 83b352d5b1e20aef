"""LoRA adapters (arXiv 2106.09685): products whose one side is an adapter's rank.

With factors A [r, in] and B [out, r] per expert and s the scaling, a product of rows by W is x W^T + t B^T with
t = s x A^T, and the gradient of its input is dy W + u A with u = s dy B. The kernel `narrow` computes t and u, [S, r]:
it reads the rows once. The wide part is added by the kernel that multiplies the rows by W, as more steps of its
contraction (`add_adapter`), so that nothing of [S, out] is written twice. The adapters' gradients, dA = u^T x and
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

from moe_triton_kernels.operands import PerExpert

MOST_RANK = 64  # of one step of the contraction


def rank_block(rank: int) -> int:
    """The rank that a step of the contraction takes."""
    return min(MOST_RANK, max(16, triton.next_power_of_2(rank)))


class AdapterArgument(NamedTuple):
    """What an adapter adds to a product, among a kernel's arguments: t [S, STEPS * BLOCK] by factors [rank, columns].

    factor   pointer to the stacked factors of the experts
    """

    t: Any
    factor: Any
    stride_e: Any
    stride_k: Any
    stride_n: Any
    rank: Any
    BLOCK: Any
    STEPS: Any


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """t [S, width] of `narrow`, and the stacked factors that it is multiplied by, per expert [rank, columns]."""

    t: Tensor
    factor: PerExpert
    rank: int

    def argument(self) -> AdapterArgument:
        block = rank_block(self.rank)
        constants = (tl.constexpr(block), tl.constexpr(self.t.shape[1] // block))
        stride_k, stride_n = self.factor.strides
        return AdapterArgument(
            self.t, self.factor.data, self.factor.stride_e, stride_k, stride_n, self.rank, *constants
        )


class Added(NamedTuple):
    """What an adapter adds to a product in a kernel: an AdapterArgument or None, and the rows of t that it is read at.

    Rows outside `row_mask` add 0.
    """

    adapter: Any
    rows: Any
    row_mask: Any


@triton.jit
def add_adapter(acc, added, expert, numbers, column_mask):
    """acc + t[rows] factor[expert], at these columns of the factor: more steps of a contraction."""
    k = tl.arange(0, added.adapter.BLOCK)
    t_rows = added.adapter.t + added.rows.to(tl.int64) * (added.adapter.STEPS * added.adapter.BLOCK)
    factor = added.adapter.factor + expert.to(tl.int64) * added.adapter.stride_e
    factor = factor + numbers.to(tl.int64) * added.adapter.stride_n
    for step in tl.static_range(added.adapter.STEPS):
        at = step * added.adapter.BLOCK + k
        t = tl.load(t_rows[:, None] + at[None, :], mask=added.row_mask[:, None], other=0.0)
        cells = factor[None, :] + (at.to(tl.int64) * added.adapter.stride_k)[:, None]
        b = tl.load(cells, mask=(at < added.adapter.rank)[:, None] & column_mask[None, :], other=0.0)
        acc = tl.dot(t, b, acc, input_precision="ieee")
    return acc
