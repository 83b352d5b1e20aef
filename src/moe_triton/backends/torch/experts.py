"""The experts in plain torch: on the CPU in blocks of rows that stay in cache (`experts_cpu`), elsewhere by products
that the host need not know the group sizes for (`experts_device`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_triton.backends.torch import experts_cpu, experts_device
from moe_triton.backends.torch.operands import Gradients, Needs, Operands, Weights, sum_rows
from moe_triton.records import ExpertSpec


def experts_forward(
    hidden: Tensor,
    weights: Tensor,
    offsets: Tensor,
    source: Tensor,
    position: Tensor,
    gate_up_proj: Weights,
    down_proj: Weights,
    gate_up_bias: Weights | None,
    down_bias: Weights | None,
    spec: ExpertSpec,
    keep_preactivation: bool,
) -> tuple[Tensor, Tensor]:
    """Returns (out [T, d], pre-activation [S, 2n] or [S, n]), in hidden's dtype; the second is empty [0] if not kept.

    hidden [T, d], weights [T, K], and the Dispatch's tensors; the projections as `ExpertSpec` says, stacked or one
    tensor per expert. The definition is `moe_triton.reference.moe_mlp`.
    """
    operands = Operands(
        hidden=hidden, weights=weights, offsets=offsets, source=source, position=position, gate_up_proj=gate_up_proj,
        down_proj=down_proj, gate_up_bias=gate_up_bias, down_bias=down_bias, spec=spec,
    )  # fmt: skip
    if hidden.device.type != "cpu":
        return experts_device.forward(operands, keep_preactivation)
    return experts_cpu.forward(operands, offsets.tolist(), keep_preactivation)


def experts_backward(
    grad_out: Tensor,
    hidden: Tensor,
    preactivation: Tensor,
    weights: Tensor,
    offsets: Tensor,
    source: Tensor,
    position: Tensor,
    gate_up_proj: Weights,
    down_proj: Weights,
    gate_up_bias: Weights | None,
    down_bias: Weights | None,
    spec: ExpertSpec,
    needs: Needs,
) -> Gradients:
    """Gradients of (hidden, weights, gate_up_proj, down_proj, gate_up_bias, down_bias), None where not needed.

    An empty `preactivation` is recomputed from hidden. An expert without rows gets zeros; so does the weight of a
    slot that is dropped or skipped. The gradient of a sequence is a list of views of one stacked buffer.
    """
    operands = Operands(
        hidden=hidden, weights=weights, offsets=offsets, source=source, position=position, gate_up_proj=gate_up_proj,
        down_proj=down_proj, gate_up_bias=gate_up_bias, down_bias=down_bias, spec=spec,
    )  # fmt: skip
    if hidden.device.type != "cpu":
        return experts_device.backward(operands, grad_out, preactivation, needs)
    return experts_cpu.backward(operands, offsets.tolist(), grad_out, preactivation, needs)


def experts_backward_rows(
    grad_out: Tensor,
    hidden: Tensor,
    preactivation: Tensor,
    weights: Tensor,
    offsets: Tensor,
    source: Tensor,
    position: Tensor,
    gate_up_proj: Weights,
    down_proj: Weights,
    gate_up_bias: Weights | None,
    down_bias: Weights | None,
    spec: ExpertSpec,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """The first half of `experts_backward`: what a sender waits for, and what the second half needs of it.

    Returns the gradients of hidden and of weights (None where not needed), the pre-activation's gradient [S, 2n] or
    [S, n], and the weighted activation [S, n]; rows past offsets[E] of the last two are not defined.
    """
    operands = Operands(
        hidden=hidden, weights=weights, offsets=offsets, source=source, position=position, gate_up_proj=gate_up_proj,
        down_proj=down_proj, gate_up_bias=gate_up_bias, down_bias=down_bias, spec=spec,
    )  # fmt: skip
    if hidden.device.type != "cpu":
        return experts_device.backward_rows(operands, grad_out, preactivation, needs)
    return experts_cpu.backward_rows(operands, offsets.tolist(), grad_out, preactivation, needs)


def experts_backward_weights(
    grad_out: Tensor,
    hidden: Tensor,
    grad_h: Tensor,
    weighted_a: Tensor,
    weights: Tensor,
    offsets: Tensor,
    source: Tensor,
    position: Tensor,
    gate_up_proj: Weights,
    down_proj: Weights,
    gate_up_bias: Weights | None,
    down_bias: Weights | None,
    spec: ExpertSpec,
    needs: Needs,
) -> tuple[Weights | None, Weights | None, Weights | None, Weights | None]:
    """The second half of `experts_backward`: the gradients of gate_up_proj, down_proj, gate_up_bias and down_bias."""
    operands = Operands(
        hidden=hidden, weights=weights, offsets=offsets, source=source, position=position, gate_up_proj=gate_up_proj,
        down_proj=down_proj, gate_up_bias=gate_up_bias, down_bias=down_bias, spec=spec,
    )  # fmt: skip
    if hidden.device.type != "cpu":
        return experts_device.backward_weights(operands, grad_out, grad_h, weighted_a, needs)
    return experts_cpu.backward_weights(operands, offsets.tolist(), grad_out, grad_h, weighted_a, needs)


def combine_rows(rows: Tensor, position: Tensor) -> Tensor:
    """[T, d]: the sum of each token's rows [R, d], in the order of position [T, J]; -1 adds nothing."""
    if rows.device.type != "cpu":
        return experts_device.sum_rows(rows, position)
    return sum_rows(torch.cat([rows, rows.new_zeros(1, rows.shape[1])]), position, zero_row=rows.shape[0])
