"""The experts where the host must not look at the data: grouped_mm where it is legal; elsewhere every expert multiplies
all S rows and keeps its own, which is E times the work.

torch takes fp16 and fp32 to grouped_mm too, but copies the offsets to the host there and loops over the experts.

Every tensor has all S rows. Those past offsets[E] are zeros wherever they could reach a sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton.backends.torch.activations import activate, activate_backward, activate_for_backward
from moe_triton.backends.torch.operands import Gradients, Needs, Operands, Weights, as_given
from moe_triton.records import ExpertSpec
from moe_triton.reference import wide


def forward(operands: Operands, keep_preactivation: bool) -> tuple[Tensor, Tensor]:
    """`experts_forward` with no host sync."""
    hidden, spec, offsets = operands.hidden, operands.spec, operands.offsets
    expert_S, slot_S, kept_S1 = _layout(operands)
    h_SN = _up(operands, expert_S, slot_S, kept_S1)
    y_Sd = _grouped(activate(h_SN, spec), _in_out(operands.down_proj, spec), offsets, expert_S)
    if operands.down_bias is not None:
        y_Sd = y_Sd + _stack(operands.down_bias)[expert_S]
    rows_Sd = (y_Sd * operands.weights.reshape(-1, 1)[slot_S]).to(hidden.dtype)
    return sum_rows(rows_Sd, operands.position), h_SN if keep_preactivation else hidden.new_empty(0)


def backward(operands: Operands, grad_out: Tensor, preactivation: Tensor, needs: Needs) -> Gradients:
    """`experts_backward` with no host sync."""
    grad_hidden, grad_weights, grad_h, weighted_a = backward_rows(operands, grad_out, preactivation, needs)
    return (grad_hidden, grad_weights, *backward_weights(operands, grad_out, grad_h, weighted_a, needs))


def backward_rows(
    operands: Operands, grad_out: Tensor, preactivation: Tensor, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """`experts_backward_rows` with no host sync."""
    hidden, spec, offsets, position = operands.hidden, operands.spec, operands.offsets, operands.position
    expert_S, slot_S, kept_S1 = _layout(operands)
    dy_Sd = _gather(operands, grad_out, slot_S, kept_S1)
    h_SN = _up(operands, expert_S, slot_S, kept_S1) if preactivation.numel() == 0 else preactivation
    h_SN = torch.where(kept_S1, h_SN, 0)
    a_Sn, activated_gate = activate_for_backward(h_SN, spec)
    w_S1 = operands.weights.reshape(-1, 1)[slot_S]
    da_Sn = _grouped(dy_Sd, _in_out(operands.down_proj, spec).mT, offsets, expert_S)
    da_Sn = torch.where(kept_S1, da_Sn, 0)
    dh_SN = torch.empty_like(h_SN)
    activate_backward((da_Sn * w_S1).to(hidden.dtype), h_SN, activated_gate, spec, dh_SN)
    weighted_a_Sn = (a_Sn * w_S1).to(hidden.dtype)

    grad_weights = grad_hidden = None
    if needs[1]:
        dw_S = torch.linalg.vecdot(da_Sn.to(wide(hidden.dtype)), a_Sn.to(wide(hidden.dtype)))
        if operands.down_bias is not None:
            dw_S = dw_S + (dy_Sd * _stack(operands.down_bias)[expert_S]).sum(-1)
        row = position.reshape(-1)
        dw_of_slot = torch.where(row >= 0, dw_S[row.clamp_min(0)], 0)
        grad_weights = dw_of_slot.view_as(operands.weights).to(operands.weights.dtype)
    if needs[0]:
        dx_Sd = _grouped(dh_SN, _in_out(operands.gate_up_proj, spec).mT, offsets, expert_S)
        grad_hidden = sum_rows(dx_Sd, position)
    return grad_hidden, grad_weights, dh_SN, weighted_a_Sn


def backward_weights(
    operands: Operands, grad_out: Tensor, grad_h: Tensor, weighted_a: Tensor, needs: Needs
) -> tuple[Weights | None, Weights | None, Weights | None, Weights | None]:
    """`experts_backward_weights` with no host sync."""
    hidden, spec, offsets = operands.hidden, operands.spec, operands.offsets
    expert_S, slot_S, kept_S1 = _layout(operands)
    dy_Sd = _gather(operands, grad_out, slot_S, kept_S1)
    grad_up = grad_down = grad_up_bias = grad_down_bias = None
    if needs[2]:
        x_Sd = _gather(operands, hidden, slot_S, kept_S1)
        grad_up = _grouped_outer(*_as_laid_out(x_Sd, grad_h, spec), offsets, expert_S)
    if needs[3]:
        grad_down = _grouped_outer(*_as_laid_out(weighted_a, dy_Sd, spec), offsets, expert_S)
    if needs[4]:
        grad_up_bias = _sum_per_expert(grad_h, offsets, expert_S)
    if needs[5]:
        w_S1 = operands.weights.reshape(-1, 1)[slot_S]
        grad_down_bias = _sum_per_expert((dy_Sd * w_S1).to(hidden.dtype), offsets, expert_S)
    return (
        as_given(operands.gate_up_proj, grad_up),
        as_given(operands.down_proj, grad_down),
        as_given(operands.gate_up_bias, grad_up_bias),
        as_given(operands.down_bias, grad_down_bias),
    )


def _gather(operands: Operands, tokens_Td: Tensor, slot_S: Tensor, kept_S1: Tensor) -> Tensor:
    """Every row's token [S, d], zeros past offsets[E]."""
    return torch.where(kept_S1, tokens_Td[slot_S // operands.position.shape[1]], 0)


def _layout(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row: its expert [S] (past offsets[E] the last), its slot [S] (0 there), whether it is kept [S, 1]."""
    offsets = operands.offsets
    row_S = torch.arange(operands.source.shape[0], device=offsets.device, dtype=offsets.dtype)
    expert_S = torch.searchsorted(offsets[1:].contiguous(), row_S, right=True).clamp_max(operands.num_experts - 1)
    return expert_S, operands.source.clamp_min(0), (row_S < offsets[-1])[:, None]


def _up(operands: Operands, expert_S: Tensor, slot_S: Tensor, kept_S1: Tensor) -> Tensor:
    """Pre-activations [S, 2n] or [S, n]."""
    x_Sd = _gather(operands, operands.hidden, slot_S, kept_S1)
    h_SN = _grouped(x_Sd, _in_out(operands.gate_up_proj, operands.spec), operands.offsets, expert_S)
    return h_SN if operands.gate_up_bias is None else h_SN + _stack(operands.gate_up_bias)[expert_S]


def _can_group(left: Tensor, right: Tensor) -> bool:
    """Whether grouped_mm takes these: CUDA, bf16, some rows, and sizes that are multiples of 16 bytes."""
    sizes = (*left.shape[1:], *right.shape[-2:]) if right.dim() == 3 else (left.shape[1], right.shape[1])
    return left.is_cuda and left.dtype == torch.bfloat16 and left.shape[0] > 0 and all(n % 8 == 0 for n in sizes)


def _grouped(x_SI: Tensor, weight_EIO: Tensor, offsets: Tensor, expert_S: Tensor) -> Tensor:
    """Row s of [S, O] is x[s] @ weight[expert of s]; rows past offsets[E] are arbitrary."""
    if _can_group(x_SI, weight_EIO):
        return F.grouped_mm(x_SI, weight_EIO, offs=offsets[1:])
    out_SO = x_SI.new_zeros(x_SI.shape[0], weight_EIO.shape[2])
    for e, weight_IO in enumerate(weight_EIO.unbind(0)):
        out_SO = torch.where((expert_S == e)[:, None], x_SI @ weight_IO, out_SO)
    return out_SO


def _as_laid_out(x_SI: Tensor, dy_SO: Tensor, spec: ExpertSpec) -> tuple[Tensor, Tensor]:
    """The factors whose outer product is a projection's gradient, first the one that gives its first dimension."""
    return (x_SI, dy_SO) if spec.is_transposed else (dy_SO, x_SI)


def _grouped_outer(left_SM: Tensor, right_SN: Tensor, offsets: Tensor, expert_S: Tensor) -> Tensor:
    """Per expert the sum over its rows of left x right, [E, M, N]; `right` is zeros past offsets[E]."""
    if _can_group(left_SM, right_SN):
        return F.grouped_mm(left_SM.T, right_SN, offs=offsets[1:])
    num_experts = offsets.shape[0] - 1
    # Both factors are masked, since zero times another expert's infinity is not zero.
    is_of_e = [(expert_S == e)[:, None] for e in range(num_experts)]
    return torch.stack([torch.where(m, left_SM, 0).T @ torch.where(m, right_SN, 0) for m in is_of_e])


def _sum_per_expert(rows_SN: Tensor, offsets: Tensor, expert_S: Tensor) -> Tensor:
    """Sum of each expert's rows, [E, N]."""
    ones = rows_SN.new_ones(rows_SN.shape[0], 8)  # 8 is the fewest columns that grouped_mm takes in bf16
    return _grouped_outer(ones, rows_SN, offsets, expert_S)[:, 0]


def sum_rows(rows_Sd: Tensor, position: Tensor) -> Tensor:
    """Sum of each token's rows, in choice order, in fp32 (fp64 for fp64)."""
    out = rows_Sd.new_zeros(position.shape[0], rows_Sd.shape[1], dtype=wide(rows_Sd.dtype))
    for row_T in position.unbind(1):
        out += torch.where((row_T >= 0)[:, None], rows_Sd[row_T.clamp_min(0)], 0)
    return out.to(rows_Sd.dtype)


def _stack(weights: Weights) -> Tensor:
    return weights if isinstance(weights, Tensor) else torch.stack(list(weights))


def _in_out(weights: Weights, spec: ExpertSpec) -> Tensor:
    """The projections of all experts as [E, in, out]."""
    return _stack(weights) if spec.is_transposed else _stack(weights).mT
