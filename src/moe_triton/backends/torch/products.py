"""The products of a block's rows with the matrices of its experts, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton.backends.torch import looped
from moe_triton.backends.torch.blocks import Block, Layout
from moe_triton.backends.torch.cpu import CpuPolicy, batched_product, is_aligned
from moe_triton.backends.torch.decoded import Decoded
from moe_triton.quantization import QuantizedWeight
from moe_triton.records import ExpertSpec, ExpertWeight, Projection

Matrices = Callable[[int | slice], Tensor]  # expert -> its projection as [out, in]; or several experts'


def matrices(projection: Projection, spec: ExpertSpec, dtype: torch.dtype) -> Matrices | Decoded:
    """The projections as [out, in], views; quantised ones are decoded to `dtype`."""
    if isinstance(projection, QuantizedWeight):
        return Decoded(projection.mT if spec.is_transposed else projection, dtype)
    of = cast(Tensor, projection)  # what is not stacked is never sliced
    return (lambda e: of[e].mT) if spec.is_transposed else (lambda e: of[e])


def transposed(matrices: Matrices | Decoded) -> Matrices | Decoded:
    return matrices.mT if isinstance(matrices, Decoded) else lambda e: matrices(e).mT


def products(
    layout: Layout,
    block: Block,
    x_mI: Tensor,
    weight: Matrices | Decoded,
    biases: ExpertWeight | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x @ weight(e).T + bias[e] for the rows of every expert e of the block, [m, O]; `out`: see `CpuPolicy.product`."""
    if isinstance(weight, Decoded):
        return weight.products(layout.policy, block.parts, x_mI, biases, out)
    if layout.is_looped:
        return looped.multiply(block, x_mI, weight, biases, out, by_row=layout.policy.fixed_rows > 0)
    if block.batch is not None:
        count = block.batch.stop - block.batch.start
        x_CmI = x_mI.view(count, -1, x_mI.shape[1])
        bias_CO = cast(Tensor, biases)[block.batch] if biases is not None else None
        out_CmO = None if out is None else out.view(count, -1, out.shape[1])
        return batched_product(x_CmI, weight(block.batch), bias_CO, out_CmO).flatten(0, 1)
    if len(block.parts) == 1:
        e = block.parts[0][0]
        return _product(layout.policy, x_mI, weight, e, biases, out)
    if layout.groups and biases is None:
        grouped = _in_one_call(layout, block, x_mI, weight)
        if grouped is not None:
            return grouped if out is None else out.copy_(grouped)
    if out is None:
        out = x_mI.new_empty(x_mI.shape[0], weight(block.parts[0][0]).shape[0])
    for e, part in block.parts:
        _product(layout.policy, x_mI[part], weight, e, biases, out[part])
    return out


def _in_one_call(layout: Layout, block: Block, x_mI: Tensor, weight: Matrices) -> Tensor | None:
    """x @ weight(e).T for the rows of every expert e of the block; None where it is no call of torch.mm for each.

    On a CPU `F.grouped_mm` is a loop over torch.mm, with the same bits: three microseconds an expert where ours takes
    six, and one for an expert that has no rows.
    """
    first, last = block.parts[0][0], block.parts[-1][0]
    if last + 1 - first > 3 * len(block.parts):
        return None
    weight_GIO = weight(slice(first, last + 1)).mT
    _, size_in, size_out = weight_GIO.shape
    flops = 2 * size_in * size_out * max(part.stop - part.start for _, part in block.parts)
    if not layout.policy.by_mm(x_mI.dtype, flops) or not is_aligned(x_mI, weight_GIO):
        return None
    ends_G = layout.offsets[first + 1 : last + 2]
    return F.grouped_mm(x_mI, weight_GIO, offs=ends_G if block.rows.start == 0 else ends_G - block.rows.start)


def _product(
    policy: CpuPolicy,
    x_mI: Tensor,
    weight: Matrices,
    expert: int,
    biases: ExpertWeight | None,
    out: Tensor | None,
) -> Tensor:
    """x @ weight(expert).T + bias[expert] for the rows of one expert; `out`: see `CpuPolicy.product`."""
    return policy.product(x_mI, weight(expert), None if biases is None else biases[expert], out)


def outer_products(layout: Layout, block: Block, left: Tensor, right: Tensor, grad: Tensor) -> None:
    """Writes left.T @ right over the rows of every expert of the block."""
    if layout.is_looped and all(part.stop - part.start <= looped.MOST_SUMMED for _, part in block.parts):
        looped.multiply_outer(block, left, right, grad)
        return
    if block.batch is not None and layout.policy.shapes_recur:
        count = block.batch.stop - block.batch.start
        left_Cmo, right_Cmi = (rows.view(count, -1, rows.shape[1]) for rows in (left, right))
        batched_product(left_Cmo.mT, right_Cmi.mT, out=grad[block.batch])
        return
    for e, part in block.parts:  # a batch would gain less here than summing over the padding costs
        layout.policy.gradient(left[part], right[part], grad[e])


def all_outer_products(layout: Layout, left: Tensor, right: Tensor) -> Tensor:
    """left.T @ right over the rows of every expert, [E, ...]; zeros for those without rows."""
    if left.shape[1] == 0 or right.shape[1] == 0:
        return left.new_zeros(len(layout.offsets) - 1, left.shape[1], right.shape[1])
    return F.grouped_mm(left.T, right, offs=layout.offsets[1:])
