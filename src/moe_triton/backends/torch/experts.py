"""The experts in plain torch. On the CPU: a loop over experts that keeps one expert's rows in cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton.backends.torch.activations import activate, activate_backward
from moe_triton.backends.torch.experts_device import device_backward, device_forward
from moe_triton.records import ExpertSpec
from moe_triton.reference import wide

Weights = Tensor | Sequence[Tensor]
Gradients = tuple[Tensor | None, Tensor | None, Weights | None, Weights | None, Weights | None, Weights | None]


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
    if hidden.device.type != "cpu":
        return device_forward(
            hidden, weights, offsets, source, position, gate_up_proj, down_proj, gate_up_bias, down_bias, spec,
            keep_preactivation,
        )  # fmt: skip
    bounds = offsets.tolist()
    tokens, row_weights = _rows(source, weights, bounds[-1], position.shape[1])
    width = _width(gate_up_proj[0], spec)
    preactivation = hidden.new_empty((source.shape[0], width) if keep_preactivation else 0)
    rows = hidden.new_empty(bounds[-1] + 1, hidden.shape[1])
    for e, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if start == end:
            continue
        x = hidden.index_select(0, tokens[start:end])
        h = torch.mm(x, _transposed(gate_up_proj[e], spec))
        if gate_up_bias is not None:
            h += gate_up_bias[e]
        if keep_preactivation:
            preactivation[start:end] = h
        y = torch.mm(activate(h, spec), _transposed(down_proj[e], spec))
        if down_bias is not None:
            y += down_bias[e]
        torch.mul(y, row_weights[start:end], out=rows[start:end])
    return _combine(rows, position), preactivation


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
    needs: tuple[bool, bool, bool, bool, bool, bool],
) -> Gradients:
    """Gradients of (hidden, weights, gate_up_proj, down_proj, gate_up_bias, down_bias), None where not needed.

    An empty `preactivation` is recomputed from hidden. An expert without rows gets zeros; so does the weight of a
    slot that is dropped or skipped. The gradient of a sequence is a list of views of one stacked buffer.
    """
    if hidden.device.type != "cpu":
        return device_backward(
            grad_out, hidden, preactivation, weights, offsets, source, position, gate_up_proj, down_proj,
            gate_up_bias, down_bias, spec, needs,
        )  # fmt: skip
    bounds = offsets.tolist()
    kept = bounds[-1]
    tokens, row_weights = _rows(source, weights, kept, position.shape[1])
    grad_rows = hidden.new_empty(kept + 1, hidden.shape[1]) if needs[0] else None
    grad_row_weights = row_weights.new_empty(kept) if needs[1] else None
    grad_up, grad_down = _stacked(gate_up_proj, needs[2]), _stacked(down_proj, needs[3])
    grad_up_bias, grad_down_bias = _stacked(gate_up_bias, needs[4]), _stacked(down_bias, needs[5])
    for e, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if start == end:
            for grad in (grad_up, grad_down, grad_up_bias, grad_down_bias):
                if grad is not None:
                    grad[e].zero_()
            continue
        w = row_weights[start:end]
        x = hidden.index_select(0, tokens[start:end])
        dy = grad_out.index_select(0, tokens[start:end])
        if preactivation.numel() > 0:
            h = preactivation[start:end]
        else:
            h = torch.mm(x, _transposed(gate_up_proj[e], spec))
            if gate_up_bias is not None:
                h += gate_up_bias[e]
        a = activate(h, spec)
        da = torch.mm(dy, _transposed(down_proj[e], spec).T)
        if grad_row_weights is not None:
            dot = (da.to(w.dtype) * a).sum(-1)
            if down_bias is not None:
                dot += torch.mv(dy.to(w.dtype), down_bias[e].to(w.dtype))
            grad_row_weights[start:end] = dot
        if grad_down is not None:
            left, right = (a * w).to(a.dtype), dy
            _outer(left, right, grad_down[e], spec)
        if grad_down_bias is not None:
            grad_down_bias[e] = torch.mv(dy.to(w.dtype).T, w[:, 0])
        dh = torch.empty_like(h)
        activate_backward((da * w).to(da.dtype), h, spec, dh)
        if grad_up is not None:
            _outer(x, dh, grad_up[e], spec)
        if grad_up_bias is not None:
            grad_up_bias[e] = dh.sum(0, dtype=w.dtype)
        if grad_rows is not None:
            torch.mm(dh, _transposed(gate_up_proj[e], spec).T, out=grad_rows[start:end])
    grad_weights = None
    if grad_row_weights is not None:
        grad_weights = torch.zeros_like(weights, memory_format=torch.contiguous_format)
        grad_weights.view(-1)[source[:kept].long()] = grad_row_weights.to(weights.dtype)
    return (
        None if grad_rows is None else _combine(grad_rows, position),
        grad_weights,
        _like(gate_up_proj, grad_up),
        _like(down_proj, grad_down),
        _like(gate_up_bias, grad_up_bias),
        _like(down_bias, grad_down_bias),
    )


def _rows(source: Tensor, weights: Tensor, kept: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Token index [kept] and router weight [kept, 1] (fp32, or fp64 for fp64 weights) of every kept row."""
    slots = source[:kept].long()
    return slots // top_k, weights.reshape(-1)[slots].to(wide(weights.dtype))[:, None]


def _width(gate_up: Tensor, spec: ExpertSpec) -> int:
    return gate_up.shape[1] if spec.is_transposed else gate_up.shape[0]


def _transposed(weight: Tensor, spec: ExpertSpec) -> Tensor:
    """One expert's projection as [in, out], a view."""
    return weight if spec.is_transposed else weight.T


def _outer(left: Tensor, right: Tensor, out: Tensor, spec: ExpertSpec) -> None:
    """Writes the gradient of a projection from its input [m, in] and the gradient of its output [m, out]."""
    if spec.is_transposed:
        torch.mm(left.T, right, out=out)
    else:
        torch.mm(right.T, left, out=out)


def _combine(rows: Tensor, position: Tensor) -> Tensor:
    """Sum of each token's rows, in choice order, in fp32. The last row of `rows` is set to zero for dropped choices."""
    rows[-1] = 0
    last = rows.shape[0] - 1
    if position.numel() == 0:
        return rows.new_zeros(position.shape[0], rows.shape[1])
    return F.embedding_bag(torch.where(position < 0, last, position), rows, mode="sum")


def _stacked(weights: Weights | None, needed: bool) -> Tensor | None:
    """Memory for the gradient of stacked weights, or of a sequence of them."""
    if weights is None or not needed:
        return None
    return weights[0].new_empty(len(weights), *weights[0].shape)


def _like(weights: Weights | None, grad: Tensor | None) -> Weights | None:
    """The stacked gradient as the weights were given: a tensor, or a list of one view per expert."""
    return grad if grad is None or isinstance(weights, Tensor) else list(grad.unbind(0))
