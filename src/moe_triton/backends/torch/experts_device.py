"""The experts where the host must not look at the data, by the grouped products that need no host sync.

Every tensor has all S rows. Those past offsets[E] are zeros wherever they could reach a sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_triton.backends.torch.activations import activate, activate_backward, activate_for_backward
from moe_triton.backends.torch.grouped import GroupedRows, grouped_outer, grouped_product, sum_per_expert
from moe_triton.records import (
    ExpertCall,
    ExpertGradients,
    ExpertSpec,
    ExpertWeight,
    ParameterGradients,
    RowGradients,
    Wanted,
    as_given,
)
from moe_triton.reference import wide


def experts_forward(call: ExpertCall, keep_preactivation: bool) -> tuple[Tensor, Tensor]:
    """Compute `experts_cpu.experts_forward` with no host sync."""
    hidden, spec, down_bias = call.hidden, call.spec, call.parameters.down_bias
    rows = _Rows(call)
    h_SN = _up(call, rows)
    y_Sd = grouped_product(activate(h_SN, spec), _in_out(call.parameters.down, spec), rows)
    if down_bias is not None:
        y_Sd = y_Sd + _stack(down_bias)[rows.expert_S]
    rows_Sd = (y_Sd * rows.weight_S1).to(hidden.dtype)
    return combine_rows(rows_Sd, call.dispatched.position), h_SN if keep_preactivation else hidden.new_empty(0)


def experts_backward(call: ExpertCall, grad_out: Tensor, preactivation: Tensor, wanted: Wanted) -> ExpertGradients:
    """Compute `experts_cpu.experts_backward` with no host sync."""
    rows = experts_backward_rows(call, grad_out, preactivation, wanted)
    return ExpertGradients(rows.hidden, rows.weights, *experts_backward_weights(call, grad_out, rows, wanted))


def experts_backward_rows(call: ExpertCall, grad_out: Tensor, preactivation: Tensor, wanted: Wanted) -> RowGradients:
    """Compute `experts_cpu.experts_backward_rows` with no host sync."""
    dtype, spec, position = call.hidden.dtype, call.spec, call.dispatched.position
    rows = _Rows(call)
    dy_Sd = rows.gather(grad_out)
    h_SN = _up(call, rows) if preactivation.numel() == 0 else preactivation
    h_SN = torch.where(rows.kept_S1, h_SN, 0)
    a_Sn, activated_gate = activate_for_backward(h_SN, spec)
    da_Sn = grouped_product(dy_Sd, _in_out(call.parameters.down, spec).mT, rows)
    da_Sn = torch.where(rows.kept_S1, da_Sn, 0)
    dh_SN = torch.empty_like(h_SN)
    activate_backward((da_Sn * rows.weight_S1).to(dtype), h_SN, activated_gate, spec, dh_SN)
    weighted_a_Sn = (a_Sn * rows.weight_S1).to(dtype)

    grad_weights = grad_hidden = None
    if wanted.weights:
        dw_S = torch.linalg.vecdot(da_Sn.to(wide(dtype)), a_Sn.to(wide(dtype)))
        if call.parameters.down_bias is not None:
            dw_S = dw_S + (dy_Sd * _stack(call.parameters.down_bias)[rows.expert_S]).sum(-1)
        row = position.reshape(-1)
        dw_of_slot = torch.where(row >= 0, dw_S[row.clamp_min(0)], 0)
        grad_weights = dw_of_slot.view_as(call.weights).to(call.weights.dtype)
    if wanted.hidden:
        grad_hidden = combine_rows(grouped_product(dh_SN, _in_out(call.parameters.gate_up, spec).mT, rows), position)
    return RowGradients(grad_hidden, grad_weights, dh_SN, weighted_a_Sn)


def experts_backward_weights(
    call: ExpertCall, grad_out: Tensor, row_grads: RowGradients, wanted: Wanted
) -> ParameterGradients:
    """Compute `experts_cpu.experts_backward_weights` with no host sync."""
    rows, spec, grad_h = _Rows(call), call.spec, row_grads.preactivation
    dy_Sd = rows.gather(grad_out)
    up = down = up_bias = down_bias = None
    if wanted.gate_up:
        up = grouped_outer(*_as_laid_out(rows.gather(call.hidden), grad_h, spec), rows)
    if wanted.down:
        down = grouped_outer(*_as_laid_out(row_grads.weighted_a, dy_Sd, spec), rows)
    if wanted.gate_up_bias:
        up_bias = sum_per_expert(grad_h, rows)
    if wanted.down_bias:
        down_bias = sum_per_expert((dy_Sd * rows.weight_S1).to(call.hidden.dtype), rows)
    grads = (up, down, up_bias, down_bias)
    return ParameterGradients(*(as_given(p, grad) for p, grad in zip(call.parameters, grads, strict=True)))


class _Rows(GroupedRows):
    """The rows of a call, and of each its token and weight_S1 [S, 1], its router weight: slot 0's past offsets[E]."""

    def __init__(self, call: ExpertCall) -> None:
        super().__init__(call.dispatched.offsets, call.num_rows)
        slot_S = call.dispatched.source.clamp_min(0)
        self.token_S = slot_S // call.dispatched.top_k
        self.weight_S1 = call.weights.reshape(-1, 1)[slot_S]

    def gather(self, tokens_Td: Tensor) -> Tensor:
        """Every row's token [S, d], zeros past offsets[E]."""
        return torch.where(self.kept_S1, tokens_Td[self.token_S], 0)


def _up(call: ExpertCall, rows: _Rows) -> Tensor:
    """Pre-activations [S, 2n] or [S, n]."""
    parameters = call.parameters
    h_SN = grouped_product(rows.gather(call.hidden), _in_out(parameters.gate_up, call.spec), rows)
    return h_SN if parameters.gate_up_bias is None else h_SN + _stack(parameters.gate_up_bias)[rows.expert_S]


def _as_laid_out(x_SI: Tensor, dy_SO: Tensor, spec: ExpertSpec) -> tuple[Tensor, Tensor]:
    """The factors whose outer product is a projection's gradient, first the one that gives its first dimension."""
    return (x_SI, dy_SO) if spec.is_transposed else (dy_SO, x_SI)


def combine_rows(rows_Sd: Tensor, position: Tensor) -> Tensor:
    """Sum each token's rows, in choice order, in fp32 (fp64 for fp64), where -1 adds nothing: [T, d]."""
    out = rows_Sd.new_zeros(position.shape[0], rows_Sd.shape[1], dtype=wide(rows_Sd.dtype))
    for row_T in position.unbind(1):
        out += torch.where((row_T >= 0)[:, None], rows_Sd[row_T.clamp_min(0)], 0)
    return out.to(rows_Sd.dtype)


def _stack(weights: ExpertWeight) -> Tensor:
    return weights if isinstance(weights, Tensor) else torch.stack(list(weights))


def _in_out(weights: ExpertWeight, spec: ExpertSpec) -> Tensor:
    """The projections of all experts as [E, in, out]."""
    return _stack(weights) if spec.is_transposed else _stack(weights).mT
