"""The experts on the CPU: a loop over experts that keeps one expert's rows in cache through all of its products."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton.backends.torch.activations import activate, activate_backward, activate_for_backward
from moe_triton.backends.torch.cpu import ROW_QUANTUM, empty, padded, product
from moe_triton.backends.torch.operands import Gradients, Needs, Operands, Weights, as_given, sum_rows
from moe_triton.records import ExpertSpec


def forward(operands: Operands, bounds: list[int], keep_preactivation: bool) -> tuple[Tensor, Tensor]:
    """`experts_forward`, given the offsets as a list."""
    hidden, spec, kept = operands.hidden, operands.spec, bounds[-1]
    tokens, weights = operands.row_slots(kept)
    # The rows that pad an expert's are the next one's, and are overwritten when its turn comes.
    tokens, weights = F.pad(tokens, (0, ROW_QUANTUM)), F.pad(weights, (0, 0, 0, ROW_QUANTUM))
    rows = empty((kept + ROW_QUANTUM, operands.hidden_size), hidden.dtype)
    num_slots = operands.source.shape[0]
    preactivation = empty((num_slots + ROW_QUANTUM, operands.width), hidden.dtype) if keep_preactivation else None
    ups, downs = _projections(operands.gate_up_proj, spec), _projections(operands.down_proj, spec)
    up_biases = _biases(operands.gate_up_bias, operands.num_experts)
    down_biases = _biases(operands.down_bias, operands.num_experts)
    for e, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            continue
        here = slice(start, start + padded(end - start))
        x = hidden.index_select(0, tokens[here])
        h = product(x, ups[e], up_biases[e], None if preactivation is None else preactivation[here])
        y = product(activate(h, spec), downs[e], down_biases[e])
        torch.mul(y, weights[here], out=rows[here])
    out = sum_rows(rows, operands.position, zero_row=kept)
    return out, hidden.new_empty(0) if preactivation is None else preactivation[:num_slots]


def backward(operands: Operands, bounds: list[int], grad_out: Tensor, preactivation: Tensor, needs: Needs) -> Gradients:
    """`experts_backward`, given the offsets as a list."""
    hidden, spec, kept = operands.hidden, operands.spec, bounds[-1]
    tokens, weights = operands.row_slots(kept)
    ups, downs = _projections(operands.gate_up_proj, spec), _projections(operands.down_proj, spec)
    up_biases = _biases(operands.gate_up_bias, operands.num_experts)
    down_biases = _biases(operands.down_bias, operands.num_experts)
    # One expert's rows, padded with zeros: x, dy, the weighted activation, and the pre-activation's gradient.
    most = padded(max(end - start for start, end in pairwise(bounds)))
    widths = (operands.hidden_size, operands.hidden_size, operands.intermediate_size, operands.width)
    buffers = [empty((most, width), hidden.dtype) for width in widths]

    grad_rows = empty((kept + ROW_QUANTUM, operands.hidden_size), hidden.dtype) if needs[0] else None
    grad_row_weights = weights.new_empty(kept) if needs[1] else None
    parameters = (operands.gate_up_proj, operands.down_proj, operands.gate_up_bias, operands.down_bias)
    grads = [_stacked(p) if need else None for p, need in zip(parameters, needs[2:], strict=True)]
    grad_up, grad_down, grad_up_bias, grad_down_bias = grads
    for e, (start, end) in enumerate(pairwise(bounds)):
        size = end - start
        if size == 0:
            for grad in grads:
                if grad is not None:
                    grad[e].zero_()
            continue
        x, dy, weighted_a, dh = (buffer[: padded(size)] for buffer in buffers)
        if size < padded(size):
            for buffer in (x, dy, weighted_a, dh):
                buffer[size:].zero_()
        torch.index_select(hidden, 0, tokens[start:end], out=x[:size])
        torch.index_select(grad_out, 0, tokens[start:end], out=dy[:size])
        w = weights[start:end]
        h = preactivation[start:end] if preactivation.numel() > 0 else product(x, ups[e], up_biases[e])[:size]
        da = product(dy, downs[e].T)[:size]
        a, activated_gate = activate_for_backward(h, spec)
        if grad_row_weights is not None:
            dw = torch.linalg.vecdot(da, a)
            if (down_bias := down_biases[e]) is not None:
                dw = dw + torch.mv(dy[:size], down_bias)
            grad_row_weights[start:end] = dw
        if grad_down is not None:
            torch.mul(a, w, out=weighted_a[:size])
            _outer(weighted_a, dy, grad_down[e], spec)
        if grad_down_bias is not None:
            grad_down_bias[e] = (dy[:size] * w).sum(0)
        activate_backward(da.mul_(w), h, activated_gate, spec, dh[:size])
        if grad_up is not None:
            _outer(x, dh, grad_up[e], spec)
        if grad_up_bias is not None:
            grad_up_bias[e] = dh[:size].sum(0)
        if grad_rows is not None:
            product(dh, ups[e].T, out=grad_rows[start : start + padded(size)])
    return (
        None if grad_rows is None else sum_rows(grad_rows, operands.position, zero_row=kept),
        None if grad_row_weights is None else operands.scatter_to_slots(grad_row_weights),
        as_given(operands.gate_up_proj, grad_up),
        as_given(operands.down_proj, grad_down),
        as_given(operands.gate_up_bias, grad_up_bias),
        as_given(operands.down_bias, grad_down_bias),
    )


def _projections(weights: Weights, spec: ExpertSpec) -> list[Tensor]:
    """One [out, in] view per expert."""
    return [weight.T if spec.is_transposed else weight for weight in weights]


def _biases(biases: Weights | None, num_experts: int) -> list[Tensor | None]:
    """One bias per expert, or None per expert."""
    return [None] * num_experts if biases is None else list(biases)


def _outer(x_mI: Tensor, dy_mO: Tensor, out: Tensor, spec: ExpertSpec) -> None:
    """Writes the gradient of a projection, given its input and the gradient of its output."""
    if spec.is_transposed:
        product(x_mI.T, dy_mO.T, out=out)
    else:
        product(dy_mO.T, x_mI.T, out=out)


def _stacked(weights: Weights | None) -> Tensor | None:
    """Memory for the gradient of stacked weights, or of a sequence of them."""
    return None if weights is None else empty((len(weights), *weights[0].shape), weights[0].dtype)
