"""The experts with fp8 products, emulated: `reference.fp8` with sums in fp32.

Operands are rounded to e4m3 and multiplied as the fp32 numbers that they stand for, an expert at a time, for which the
host reads the offsets once a pass. A product of two codes is exact in fp32, so that only the order of the sums and the
place of the scales differ from the partial sums of 128 that kernels make.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from moe_triton.backends.torch.activations import (
    activate,
    activate_backward,
    activate_by_full_vectors,
    activate_for_backward,
)
from moe_triton.backends.torch.experts_device import (
    Rows,
    adapted,
    adapter_gradients,
    as_laid_out,
    combine_rows,
    linear,
    stack,
)
from moe_triton.backends.torch.grouped import product_by_row, sum_per_expert
from moe_triton.quantization.fp8 import BLOCKWISE, MXFP8, Recipe
from moe_triton.records import (
    ExpertCall,
    ExpertGradients,
    ExpertWeight,
    ParameterGradients,
    Projection,
    RowGradients,
    Wanted,
    as_given,
)

__all__ = [
    "combine_rows",
    "experts_backward",
    "experts_backward_rows",
    "experts_backward_weights",
    "experts_forward",
    "linear",
]


def experts_forward(call: ExpertCall, keep_preactivation: bool) -> tuple[Tensor, Tensor]:
    """Compute `experts_cpu.experts_forward` with fp8 products."""
    spec, dtype, parameters = call.spec, call.hidden.dtype, call.parameters
    rows = Rows(call, by_row=spec.batch_invariant)
    h_SN = _up(call, rows)
    by_row = spec.batch_invariant and h_SN.device.type == "cpu"
    a_Sn = (activate_by_full_vectors if by_row else activate)(h_SN.float(), spec)
    y_Sd = adapted(_product(a_Sn, call, parameters.down, rows), a_Sn.to(dtype), call.down_lora, rows)
    if parameters.down_bias is not None:
        y_Sd = y_Sd + stack(parameters.down_bias)[rows.expert_S]
    rows_Sd = (y_Sd * rows.weight_S1).to(dtype)
    return combine_rows(rows_Sd, call.dispatched.position), h_SN if keep_preactivation else h_SN.new_empty(0)


def experts_backward(call: ExpertCall, grad_out: Tensor, preactivation: Tensor, wanted: Wanted) -> ExpertGradients:
    """Compute `experts_cpu.experts_backward` with fp8 products."""
    rows = experts_backward_rows(call, grad_out, preactivation, wanted)
    return ExpertGradients(rows.hidden, rows.weights, *experts_backward_weights(call, grad_out, rows, wanted))


def experts_backward_rows(call: ExpertCall, grad_out: Tensor, preactivation: Tensor, wanted: Wanted) -> RowGradients:
    """Compute `experts_cpu.experts_backward_rows` with fp8 products."""
    dtype, spec, position, parameters = call.hidden.dtype, call.spec, call.dispatched.position, call.parameters
    rows = Rows(call)
    dy_Sd = rows.gather(grad_out)
    h_SN = _up(call, rows) if preactivation.numel() == 0 else preactivation
    h_SN = torch.where(rows.kept_S1, h_SN, 0).float()
    a_Sn, activated_gate = activate_for_backward(h_SN, spec)
    da_Sn = _product(dy_Sd, call, parameters.down, rows, back=True)
    da_Sn = torch.where(rows.kept_S1, adapted(da_Sn, dy_Sd, call.down_lora, rows, back=True), 0)
    dh_SN = torch.empty_like(h_SN)
    activate_backward(da_Sn * rows.weight_S1, h_SN, activated_gate, spec, dh_SN)
    dh_SN = dh_SN.to(dtype)

    grad_weights = grad_hidden = None
    if wanted.weights:
        dw_S = torch.linalg.vecdot(da_Sn, a_Sn)
        if parameters.down_bias is not None:
            dw_S = dw_S + (dy_Sd.float() * stack(parameters.down_bias)[rows.expert_S]).sum(-1)
        row = position.reshape(-1)
        dw_of_slot = torch.where(row >= 0, dw_S[row.clamp_min(0)], 0)
        grad_weights = dw_of_slot.view_as(call.weights).to(call.weights.dtype)
    if wanted.hidden:
        dx_Sd = _product(dh_SN, call, parameters.gate_up, rows, back=True)
        dx_Sd = adapted(dx_Sd, dh_SN, call.gate_up_lora, rows, back=True)
        grad_hidden = combine_rows(dx_Sd.to(dtype), position)
    return RowGradients(grad_hidden, grad_weights, dh_SN, (a_Sn * rows.weight_S1).to(dtype))


def experts_backward_weights(
    call: ExpertCall, grad_out: Tensor, row_grads: RowGradients, wanted: Wanted
) -> ParameterGradients:
    """Compute `experts_cpu.experts_backward_weights` with fp8 products."""
    rows, grad_h, wanted = Rows(call), row_grads.preactivation, wanted.of(call.parameters)
    x_Sd, dy_Sd = rows.gather(call.hidden), rows.gather(grad_out)
    up = down = up_bias = down_bias = None
    if wanted.gate_up:
        up = _outer(*as_laid_out(x_Sd, grad_h, call.spec), rows, _recipe(call))
    if wanted.down:
        down = _outer(*as_laid_out(row_grads.weighted_a, dy_Sd, call.spec), rows, _recipe(call))
    if wanted.gate_up_bias:
        up_bias = sum_per_expert(grad_h, rows)
    if wanted.down_bias:
        down_bias = sum_per_expert((dy_Sd * rows.weight_S1).to(call.hidden.dtype), rows)
    up_lora = adapter_gradients(call.gate_up_lora, x_Sd, grad_h, rows, wanted[6:8])
    down_lora = adapter_gradients(call.down_lora, row_grads.weighted_a, dy_Sd, rows, wanted[8:10])
    grads = (up, down, up_bias, down_bias, *up_lora, *down_lora)
    return ParameterGradients(*(as_given(p, grad) for p, grad in zip(call.parameters, grads, strict=True)))


def _recipe(call: ExpertCall) -> Recipe:
    return MXFP8 if call.spec.microscaled else BLOCKWISE


def _up(call: ExpertCall, rows: Rows) -> Tensor:
    """Pre-activations [S, 2n] or [S, n], in hidden's dtype."""
    parameters, x_Sd = call.parameters, rows.gather(call.hidden)
    h_SN = adapted(_product(x_Sd, call, parameters.gate_up, rows), x_Sd, call.gate_up_lora, rows)
    if parameters.gate_up_bias is not None:
        h_SN = h_SN + stack(parameters.gate_up_bias)[rows.expert_S]
    return h_SN.to(call.hidden.dtype)


def _product(x_SI: Tensor, call: ExpertCall, projection: Projection, rows: Rows, *, back: bool = False) -> Tensor:
    """Multiply every row by its expert's projection, [S, O] fp32; or with `back` by the transpose of it."""
    matrices = cast(ExpertWeight, projection)  # a quantised one is refused with fp8
    from_in = call.spec.is_transposed != back  # whether the product contracts over a matrix's first dimension
    recipe = _recipe(call)
    x_SI, size_out = recipe.rows(x_SI), matrices[0].shape[1 if from_in else 0]
    out_SO = x_SI.new_zeros(rows.num_rows, size_out)
    product = product_by_row if rows.by_row else torch.mm
    for e, part in rows.ranges:
        matrix = recipe.projection(matrices[e], 0 if from_in else 1)
        out_SO[part] = product(x_SI[part], matrix if from_in else matrix.mT)
    return out_SO


def _outer(left_SM: Tensor, right_SN: Tensor, rows: Rows, recipe: Recipe) -> Tensor:
    """Sum left x right over each expert's rows, both rounded by groups of these, [E, M, N] in left's dtype."""
    out_EMN = left_SM.new_zeros(rows.num_experts, left_SM.shape[1], right_SN.shape[1])
    for e, part in rows.ranges:
        left, right = (recipe.columns(x[part]) for x in (left_SM, right_SN))
        out_EMN[e] = left.T @ right
    return out_EMN
