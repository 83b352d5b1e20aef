"""The experts where the host must not look at the data, by the grouped products that need no host sync.

Every tensor has all S rows. Those past offsets[E] are zeros wherever they could reach a sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton.backends.torch.activations import activate, activate_backward, activate_for_backward
from moe_triton.backends.torch.grouped import (
    GroupedRows,
    grouped_outer,
    grouped_product,
    product_by_row,
    sum_per_expert,
)
from moe_triton.records import (
    ExpertCall,
    ExpertGradients,
    ExpertSpec,
    ExpertWeight,
    Lora,
    ParameterGradients,
    Projection,
    RowGradients,
    Wanted,
    as_given,
)
from moe_triton.reference import dequantized, wide


def experts_forward(call: ExpertCall, keep_preactivation: bool) -> tuple[Tensor, Tensor]:
    """Compute `experts_cpu.experts_forward` with no host sync."""
    hidden, spec, down_bias = call.hidden, call.spec, call.parameters.down_bias
    rows = Rows(call, by_row=spec.batch_invariant)
    h_SN = _up(call, rows)
    a_Sn = activate(h_SN, spec)
    y_Sd = adapted(grouped_product(a_Sn, _in_out(call.parameters.down, call), rows), a_Sn, call.down_lora, rows)
    if down_bias is not None:
        y_Sd = y_Sd + stack(down_bias)[rows.expert_S]
    rows_Sd = (y_Sd * rows.weight_S1).to(hidden.dtype)
    return combine_rows(rows_Sd, call.dispatched.position), h_SN if keep_preactivation else hidden.new_empty(0)


def experts_backward(call: ExpertCall, grad_out: Tensor, preactivation: Tensor, wanted: Wanted) -> ExpertGradients:
    """Compute `experts_cpu.experts_backward` with no host sync."""
    rows = experts_backward_rows(call, grad_out, preactivation, wanted)
    return ExpertGradients(rows.hidden, rows.weights, *experts_backward_weights(call, grad_out, rows, wanted))


def experts_backward_rows(call: ExpertCall, grad_out: Tensor, preactivation: Tensor, wanted: Wanted) -> RowGradients:
    """Compute `experts_cpu.experts_backward_rows` with no host sync."""
    dtype, spec, position = call.hidden.dtype, call.spec, call.dispatched.position
    rows = Rows(call)
    dy_Sd = rows.gather(grad_out)
    h_SN = _up(call, rows) if preactivation.numel() == 0 else preactivation
    h_SN = torch.where(rows.kept_S1, h_SN, 0)
    a_Sn, activated_gate = activate_for_backward(h_SN, spec)
    da_Sn = grouped_product(dy_Sd, _in_out(call.parameters.down, call).mT, rows)
    da_Sn = torch.where(rows.kept_S1, adapted(da_Sn, dy_Sd, call.down_lora, rows, back=True), 0)
    dh_SN = torch.empty_like(h_SN)
    activate_backward((da_Sn * rows.weight_S1).to(dtype), h_SN, activated_gate, spec, dh_SN)
    weighted_a_Sn = (a_Sn * rows.weight_S1).to(dtype)

    grad_weights = grad_hidden = None
    if wanted.weights:
        dw_S = torch.linalg.vecdot(da_Sn.to(wide(dtype)), a_Sn.to(wide(dtype)))
        if call.parameters.down_bias is not None:
            dw_S = dw_S + (dy_Sd * stack(call.parameters.down_bias)[rows.expert_S]).sum(-1)
        row = position.reshape(-1)
        dw_of_slot = torch.where(row >= 0, dw_S[row.clamp_min(0)], 0)
        grad_weights = dw_of_slot.view_as(call.weights).to(call.weights.dtype)
    if wanted.hidden:
        dx_Sd = grouped_product(dh_SN, _in_out(call.parameters.gate_up, call).mT, rows)
        grad_hidden = combine_rows(adapted(dx_Sd, dh_SN, call.gate_up_lora, rows, back=True), position)
    return RowGradients(grad_hidden, grad_weights, dh_SN, weighted_a_Sn)


def experts_backward_weights(
    call: ExpertCall, grad_out: Tensor, row_grads: RowGradients, wanted: Wanted
) -> ParameterGradients:
    """Compute `experts_cpu.experts_backward_weights` with no host sync."""
    rows, spec, grad_h, wanted = Rows(call), call.spec, row_grads.preactivation, wanted.of(call.parameters)
    dy_Sd = rows.gather(grad_out)
    up = down = up_bias = down_bias = None
    if wanted.gate_up:
        up = grouped_outer(*as_laid_out(rows.gather(call.hidden), grad_h, spec), rows)
    if wanted.down:
        down = grouped_outer(*as_laid_out(row_grads.weighted_a, dy_Sd, spec), rows)
    if wanted.gate_up_bias:
        up_bias = sum_per_expert(grad_h, rows)
    if wanted.down_bias:
        down_bias = sum_per_expert((dy_Sd * rows.weight_S1).to(call.hidden.dtype), rows)
    up_lora = adapter_gradients(call.gate_up_lora, rows.gather(call.hidden), grad_h, rows, wanted[6:8])
    down_lora = adapter_gradients(call.down_lora, row_grads.weighted_a, dy_Sd, rows, wanted[8:10])
    grads = (up, down, up_bias, down_bias, *up_lora, *down_lora)
    return ParameterGradients(*(as_given(p, grad) for p, grad in zip(call.parameters, grads, strict=True)))


class Rows(GroupedRows):
    """The rows of a call, and of each its token and weight_S1 [S, 1], its router weight: slot 0's past offsets[E]."""

    def __init__(self, call: ExpertCall, *, by_row: bool = False) -> None:
        super().__init__(call.dispatched.offsets, call.num_rows, by_row=by_row)
        slot_S = call.dispatched.source.clamp_min(0)
        self.token_S = slot_S // call.dispatched.top_k
        self.weight_S1 = call.weights.reshape(-1, 1)[slot_S]

    def gather(self, tokens_Td: Tensor) -> Tensor:
        """Every row's token [S, d], zeros past offsets[E]."""
        return torch.where(self.kept_S1, tokens_Td[self.token_S], 0)


def _up(call: ExpertCall, rows: Rows) -> Tensor:
    """Pre-activations [S, 2n] or [S, n]."""
    parameters, x_Sd = call.parameters, rows.gather(call.hidden)
    h_SN = adapted(grouped_product(x_Sd, _in_out(parameters.gate_up, call), rows), x_Sd, call.gate_up_lora, rows)
    return h_SN if parameters.gate_up_bias is None else h_SN + stack(parameters.gate_up_bias)[rows.expert_S]


def adapted(y_SO: Tensor, x_SI: Tensor, lora: Lora | None, rows: Rows, *, back: bool = False) -> Tensor:
    """Add the adapter's part to a product of x, or with `back` to the gradient of its input, made of that of y."""
    if (lora := _padded(lora)) is None:
        return y_SO
    first, second = (lora.b, lora.a) if back else (lora.a.mT, lora.b.mT)
    return y_SO + grouped_product(_narrow(x_SI, first, lora.scaling, rows), second, rows)


def _narrow(x_SI: Tensor, factor_EIr: Tensor, scaling: float, rows: Rows) -> Tensor:
    """Compute scaling * x @ factor[e] for every row, [S, r]; zeros past offsets[E]."""
    return torch.where(rows.kept_S1, scaling * grouped_product(x_SI, factor_EIr, rows), 0)


def adapter_gradients(
    lora: Lora | None, x_SI: Tensor, dy_SO: Tensor, rows: Rows, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of a [E, r, I] and b [E, O, r], given the input of the product and the gradient of its output."""
    if lora is None:
        return None, None
    rank, lora = lora.a.shape[1], _padded(lora)
    assert lora is not None
    grad_a = grad_b = None
    if wanted[0]:
        grad_a = grouped_outer(_narrow(dy_SO, lora.b, lora.scaling, rows), x_SI, rows)[:, :rank]
    if wanted[1]:
        grad_b = grouped_outer(dy_SO, _narrow(x_SI, lora.a.mT, lora.scaling, rows), rows)[:, :, :rank]
    return grad_a, grad_b


def _padded(lora: Lora | None) -> Lora | None:
    """The adapter with a rank of 16 bytes or a multiple, filled up with zeros: what `can_group` wants."""
    if lora is None:
        return None
    more = -lora.a.shape[1] % (16 // lora.a.element_size())
    a, b = (F.pad(x, pad).contiguous() for x, pad in ((lora.a, (0, 0, 0, more)), (lora.b, (0, more))))
    return Lora(a, b, lora.scaling)


def as_laid_out(x_SI: Tensor, dy_SO: Tensor, spec: ExpertSpec) -> tuple[Tensor, Tensor]:
    """The factors whose outer product is a projection's gradient, first the one that gives its first dimension."""
    return (x_SI, dy_SO) if spec.is_transposed else (dy_SO, x_SI)


def combine_rows(rows_Sd: Tensor, position: Tensor) -> Tensor:
    """Sum each token's rows, in choice order, in fp32 (fp64 for fp64), where -1 adds nothing: [T, d]."""
    out = rows_Sd.new_zeros(position.shape[0], rows_Sd.shape[1], dtype=wide(rows_Sd.dtype))
    for row_T in position.unbind(1):
        out += torch.where((row_T >= 0)[:, None], rows_Sd[row_T.clamp_min(0)], 0)
    return out.to(rows_Sd.dtype)


def linear(x_mI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Compute x @ weight.T + bias such that a row's bits depend on this row alone, [m, O]."""
    y_mO = product_by_row(x_mI, weight_OI.mT)
    return y_mO if bias_O is None else y_mO + bias_O


def stack(weights: ExpertWeight) -> Tensor:
    return weights if isinstance(weights, Tensor) else torch.stack(list(weights))


def _in_out(projection: Projection, call: ExpertCall) -> Tensor:
    """The projections of all experts as [E, in, out]; quantised ones are decoded for this product alone."""
    stacked = stack(dequantized(projection, call.hidden.dtype))
    return stacked if call.spec.is_transposed else stacked.mT
