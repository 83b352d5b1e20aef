"""The experts on the CPU when each has a few rows: all are padded to the fullest one and go through batched products.

The weights' bytes rule the time then, and one call over all experts reads them faster than a call per expert does.
M is the padded number of rows per expert; everything in a padding row is zero, save what a bias puts there.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton.backends.torch.activations import activate, activate_backward, activate_for_backward
from moe_triton.backends.torch.cpu import ROW_QUANTUM
from moe_triton.backends.torch.memory import empty
from moe_triton.backends.torch.operands import Gradients, Needs, Operands, Weights, sum_rows
from moe_triton.records import ExpertSpec


def forward(operands: Operands, bounds: list[int], keep_preactivation: bool) -> tuple[Tensor, Tensor]:
    """`experts_forward`, given the offsets as a list; all parameters are stacked."""
    hidden, spec, kept = operands.hidden, operands.spec, bounds[-1]
    row_EM, padded_row = _padding(operands, bounds)
    token_EM, w_EM1 = _padded_slots(operands, row_EM, kept)
    h_EMN = _product(_take(hidden, token_EM), _in_out(operands.gate_up_proj, spec), operands.gate_up_bias)
    a_EMn = activate(h_EMN.flatten(0, 1), spec).view(*row_EM.shape, -1)
    y_EMd = _product(a_EMn, _in_out(operands.down_proj, spec), operands.down_bias)
    rows = empty((row_EM.numel() + 1, operands.hidden_size), hidden.dtype)
    torch.mul(y_EMd, w_EM1, out=rows[:-1].view_as(y_EMd))
    out = _sum_padded(rows, padded_row, operands.position)
    if not keep_preactivation:
        return out, hidden.new_empty(0)
    preactivation = empty((operands.source.shape[0], operands.width), hidden.dtype)
    torch.index_select(h_EMN.flatten(0, 1), 0, padded_row, out=preactivation[:kept])
    return out, preactivation


def backward(operands: Operands, bounds: list[int], grad_out: Tensor, preactivation: Tensor, needs: Needs) -> Gradients:
    """`experts_backward`, given the offsets as a list; all parameters are stacked."""
    hidden, spec, kept = operands.hidden, operands.spec, bounds[-1]
    row_EM, padded_row = _padding(operands, bounds)
    token_EM, w_EM1 = _padded_slots(operands, row_EM, kept)
    up_EIO, down_EIO = _in_out(operands.gate_up_proj, spec), _in_out(operands.down_proj, spec)
    x_EMd, dy_EMd = _take(hidden, token_EM), _take(grad_out, token_EM)
    if preactivation.numel() > 0:
        h_EMN = _take(preactivation[:kept], row_EM)
    else:
        h_EMN = _product(x_EMd, up_EIO, operands.gate_up_bias)
    a_Rn, activated_gate = activate_for_backward(h_EMN.flatten(0, 1), spec)
    a_EMn = a_Rn.view(*row_EM.shape, -1)
    da_EMn = torch.bmm(dy_EMd, down_EIO.mT)

    grad_weights = grad_up = grad_down = grad_up_bias = grad_down_bias = grad_hidden = None
    if needs[1]:
        dw_EM = torch.linalg.vecdot(da_EMn, a_EMn)
        if isinstance(operands.down_bias, Tensor):
            dw_EM = dw_EM + torch.linalg.vecdot(dy_EMd, operands.down_bias[:, None])
        grad_weights = operands.scatter_to_slots(dw_EM.flatten().index_select(0, padded_row))
    if needs[3]:
        grad_down = _outer((a_EMn * w_EM1).to(hidden.dtype), dy_EMd, spec)
    if needs[5]:
        grad_down_bias = (dy_EMd * w_EM1).sum(1).to(hidden.dtype)
    dh_EMN = torch.empty_like(h_EMN)
    da_EMn.mul_(w_EM1)
    activate_backward(da_EMn.flatten(0, 1), h_EMN.flatten(0, 1), activated_gate, spec, dh_EMN.flatten(0, 1))
    if needs[2]:
        grad_up = _outer(x_EMd, dh_EMN, spec)
    if needs[4]:
        grad_up_bias = dh_EMN.sum(1)
    if needs[0]:
        rows = empty((row_EM.numel() + 1, operands.hidden_size), hidden.dtype)
        torch.bmm(dh_EMN, up_EIO.mT, out=rows[:-1].view_as(x_EMd))
        grad_hidden = _sum_padded(rows, padded_row, operands.position)
    return grad_hidden, grad_weights, grad_up, grad_down, grad_up_bias, grad_down_bias


def _padding(operands: Operands, bounds: list[int]) -> tuple[Tensor, Tensor]:
    """The dispatch row of every padded row, [E, M], `kept` in the padding; and the padded row of every kept row."""
    sizes_E = operands.offsets.diff()
    most = max(int(sizes_E.max()), 1)
    rank_M = torch.arange(most + -most % ROW_QUANTUM, dtype=torch.int32)
    is_row_EM = rank_M < sizes_E[:, None]
    row_EM = torch.where(is_row_EM, operands.offsets[:-1, None] + rank_M, bounds[-1])
    return row_EM, is_row_EM.flatten().nonzero().squeeze(1)


def _padded_slots(operands: Operands, row_EM: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Token [E, M] and router weight [E, M, 1] of every padded row; token T and weight 0 in the padding."""
    tokens, weights = operands.row_slots(kept)
    tokens = F.pad(tokens, (0, 1), value=operands.hidden.shape[0])
    return tokens[row_EM], _take(weights, row_EM)


def _take(values: Tensor, index_EM: Tensor) -> Tensor:
    """Rows of `values` [N, width] by index, as [E, M, width]; index N stands for zeros."""
    return F.pad(values, (0, 0, 0, 1)).index_select(0, index_EM.flatten()).view(*index_EM.shape, -1)


def _product(x_EMI: Tensor, weight_EIO: Tensor, bias_EO: Weights | None) -> Tensor:
    y_EMO = torch.bmm(x_EMI, weight_EIO)
    if isinstance(bias_EO, Tensor):
        y_EMO += bias_EO[:, None]
    return y_EMO


def _outer(x_EMI: Tensor, dy_EMO: Tensor, spec: ExpertSpec) -> Tensor:
    """The gradient of a stacked projection, given its input and the gradient of its output."""
    left, right = (x_EMI, dy_EMO) if spec.is_transposed else (dy_EMO, x_EMI)
    out = empty((left.shape[0], left.shape[2], right.shape[2]), left.dtype)
    return torch.bmm(left.mT, right, out=out)


def _sum_padded(rows: Tensor, padded_row: Tensor, position: Tensor) -> Tensor:
    """`sum_rows` where the rows are padded ones and the last of them is spare."""
    last = rows.shape[0] - 1
    to_padded = F.pad(padded_row, (0, 1), value=last)  # position -1 finds the spare row
    return sum_rows(rows, to_padded[position], zero_row=last)


def _in_out(weights: Weights, spec: ExpertSpec) -> Tensor:
    """Stacked projections as [E, in, out]."""
    stacked = cast(Tensor, weights)
    return stacked if spec.is_transposed else stacked.mT
