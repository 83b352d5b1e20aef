"""The experts in plain torch where the host must not look at the data: grouped_mm where legal, masks elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton.backends.torch.activations import activate, activate_backward
from moe_triton.records import ExpertSpec
from moe_triton.reference import wide

Weights = Tensor | Sequence[Tensor]
Gradients = tuple[Tensor | None, Tensor | None, Weights | None, Weights | None, Weights | None, Weights | None]


def device_forward(
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
    """`experts_forward` with no host sync: every tensor has all S rows, and those past offsets[E] are zeros."""
    expert_S, slot_S, kept_S1 = _layout(offsets, source)
    h_SN = _up(hidden, offsets, expert_S, slot_S // position.shape[1], kept_S1, gate_up_proj, gate_up_bias, spec)
    y_Sd = _grouped(activate(h_SN, spec), _as_in_out(down_proj, spec), offsets, expert_S)
    if down_bias is not None:
        y_Sd = y_Sd + _stack(down_bias)[expert_S]
    w_S1 = weights.reshape(-1, 1)[slot_S].to(wide(hidden.dtype))
    rows_Sd = (y_Sd * w_S1).to(hidden.dtype)
    return _combine(rows_Sd, position), h_SN if keep_preactivation else hidden.new_empty(0)


def device_backward(
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
    needs: tuple[bool, bool, bool, bool, bool, bool],
) -> Gradients:
    """`experts_backward` with no host sync; rows past offsets[E] are zeros throughout, so they add nothing."""
    dtype, wide_dtype = hidden.dtype, wide(hidden.dtype)
    expert_S, slot_S, kept_S1 = _layout(offsets, source)
    token_S = slot_S // position.shape[1]
    h_SN = preactivation
    if h_SN.numel() == 0:
        h_SN = _up(hidden, offsets, expert_S, token_S, kept_S1, gate_up_proj, gate_up_bias, spec)
    h_SN = torch.where(kept_S1, h_SN, 0)
    a_Sn = torch.where(kept_S1, activate(h_SN, spec), 0)
    dy_Sd = torch.where(kept_S1, grad_out[token_S], 0)
    w_S1 = weights.reshape(-1, 1)[slot_S].to(wide_dtype)
    da_Sn = torch.where(kept_S1, _grouped(dy_Sd, _as_in_out(down_proj, spec).mT, offsets, expert_S), 0)
    dh_SN = torch.empty_like(h_SN)
    activate_backward((da_Sn * w_S1).to(dtype), h_SN, spec, dh_SN)

    grad_weights: Tensor | None = None
    if needs[1]:
        dot_S = (da_Sn.to(wide_dtype) * a_Sn).sum(-1)
        if down_bias is not None:
            dot_S = dot_S + (dy_Sd.to(wide_dtype) * _stack(down_bias)[expert_S]).sum(-1)
        flat = position.reshape(-1).long()
        grad_weights = torch.where(flat >= 0, dot_S[flat.clamp_min(0)], 0).view_as(weights).to(weights.dtype)
    hidden_rows = torch.where(kept_S1, hidden[token_S], 0)
    one_hot_SE = (expert_S[:, None] == torch.arange(offsets.shape[0] - 1, device=hidden.device)).to(wide_dtype)
    grad_up = grad_down = grad_up_bias = grad_down_bias = None
    if needs[2]:
        grad_up = _grouped_outer(hidden_rows, dh_SN, offsets, expert_S, spec)
    if needs[3]:
        grad_down = _grouped_outer((a_Sn * w_S1).to(dtype), dy_Sd, offsets, expert_S, spec)
    if needs[4]:
        grad_up_bias = (one_hot_SE.T @ dh_SN.to(wide_dtype)).to(dtype)
    if needs[5]:
        grad_down_bias = (one_hot_SE.T @ (dy_Sd * w_S1)).to(dtype)
    grad_hidden = None
    if needs[0]:
        grad_hidden = _combine(_grouped(dh_SN, _as_in_out(gate_up_proj, spec).mT, offsets, expert_S), position)
    return (
        grad_hidden,
        grad_weights,
        _like(gate_up_proj, grad_up),
        _like(down_proj, grad_down),
        _like(gate_up_bias, grad_up_bias),
        _like(down_bias, grad_down_bias),
    )


def _layout(offsets: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row: its expert [S] (the last one past offsets[E]), its slot [S] (0 there), whether it is kept [S, 1]."""
    row_S = torch.arange(source.shape[0], device=source.device, dtype=offsets.dtype)
    expert_S = torch.searchsorted(offsets[1:], row_S, right=True).clamp_max(offsets.shape[0] - 2)
    return expert_S, source.long().clamp_min(0), (row_S < offsets[-1])[:, None]


def _up(
    hidden: Tensor,
    offsets: Tensor,
    expert_S: Tensor,
    token_S: Tensor,
    kept_S1: Tensor,
    gate_up_proj: Weights,
    gate_up_bias: Weights | None,
    spec: ExpertSpec,
) -> Tensor:
    """Pre-activations [S, 2n] or [S, n]."""
    h_SN = _grouped(torch.where(kept_S1, hidden[token_S], 0), _as_in_out(gate_up_proj, spec), offsets, expert_S)
    return h_SN if gate_up_bias is None else h_SN + _stack(gate_up_bias)[expert_S]


def _can_group(a: Tensor, b: Tensor) -> bool:
    """grouped_mm runs without a host sync on CUDA in bf16 only, with rows that are multiples of 16 bytes."""
    return a.is_cuda and a.dtype == torch.bfloat16 and all(size % 8 == 0 for size in (*a.shape[1:], *b.shape[-2:]))


def _grouped(x_SI: Tensor, weight_EIO: Tensor, offsets: Tensor, expert_S: Tensor) -> Tensor:
    """Row s of [S, O] is x[s] @ weight[expert of s]; rows past offsets[E] are anything finite or not."""
    if _can_group(x_SI, weight_EIO):
        return F.grouped_mm(x_SI, weight_EIO, offs=offsets[1:])
    out_SO = x_SI.new_zeros(x_SI.shape[0], weight_EIO.shape[2])
    for e, weight_IO in enumerate(weight_EIO.unbind(0)):
        out_SO = torch.where((expert_S == e)[:, None], x_SI @ weight_IO, out_SO)
    return out_SO


def _grouped_outer(left_SI: Tensor, right_SO: Tensor, offsets: Tensor, expert_S: Tensor, spec: ExpertSpec) -> Tensor:
    """Per expert the sum over its rows of left x right, as the projection lies in memory: [E, O, I] or [E, I, O]."""
    a, b = (left_SI, right_SO) if spec.is_transposed else (right_SO, left_SI)
    if _can_group(a, b):
        return F.grouped_mm(a.T, b, offs=offsets[1:])
    num_experts = offsets.shape[0] - 1
    return torch.stack([torch.where((expert_S == e)[:, None], a, 0).T @ b for e in range(num_experts)])


def _combine(rows_Sd: Tensor, position: Tensor) -> Tensor:
    """Sum of each token's rows, in choice order, in fp32 (fp64 for fp64)."""
    out = rows_Sd.new_zeros(position.shape[0], rows_Sd.shape[1], dtype=wide(rows_Sd.dtype))
    for row_T in position.long().unbind(1):
        out += torch.where((row_T >= 0)[:, None], rows_Sd[row_T.clamp_min(0)], 0)
    return out.to(rows_Sd.dtype)


def _stack(weights: Weights) -> Tensor:
    return weights if isinstance(weights, Tensor) else torch.stack(list(weights))


def _as_in_out(weights: Weights, spec: ExpertSpec) -> Tensor:
    """The projections of all experts as [E, in, out]."""
    stacked = _stack(weights)
    return stacked if spec.is_transposed else stacked.mT


def _like(weights: Weights | None, grad: Tensor | None) -> Weights | None:
    """The stacked gradient as the weights were given: a tensor, or a list of one view per expert."""
    return grad if grad is None or isinstance(weights, Tensor) else list(grad.unbind(0))
