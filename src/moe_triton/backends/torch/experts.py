"""The experts in plain torch. On the CPU: a loop over experts that keeps one expert's rows in cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton.backends.torch.activations import activate, activate_backward
from moe_triton.backends.torch.cpu import ROW_QUANTUM, empty, padded, product
from moe_triton.backends.torch.experts_device import device_backward, device_forward
from moe_triton.records import ExpertSpec

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
    kept, num_slots = bounds[-1], source.shape[0]
    tokens, row_weights = _rows(source, weights, kept, position.shape[1])
    # Padding rows spill over into the rows of the next expert, which come later and overwrite them.
    rows = empty((kept + ROW_QUANTUM, hidden.shape[1]), hidden.dtype)
    preactivation = hidden.new_empty(0)
    if keep_preactivation:
        preactivation = empty((num_slots + ROW_QUANTUM, _width(gate_up_proj[0], spec)), hidden.dtype)
    for e, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if start == end:
            continue
        stop = start + padded(end - start)
        x = hidden.index_select(0, tokens[start:stop])
        h = product(
            x,
            _out_in(gate_up_proj[e], spec),
            None if gate_up_bias is None else gate_up_bias[e],
            preactivation[start:stop] if keep_preactivation else None,
        )
        y = product(activate(h, spec), _out_in(down_proj[e], spec), None if down_bias is None else down_bias[e])
        torch.mul(y, row_weights[start:stop], out=rows[start:stop])
    return _combine(rows, kept, position), preactivation[:num_slots]


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
    sizes = [end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    most, width = padded(max(sizes, default=0)), _width(gate_up_proj[0], spec)
    # One expert's rows, padded with zeros: x, dy, the weighted activation and the pre-activation's gradient.
    x_buffer, dy_buffer = (empty((most, hidden.shape[1]), hidden.dtype) for _ in range(2))
    dh_buffer = empty((most, width), hidden.dtype)
    aw_buffer = empty((most, width // 2 if spec.is_gated else width), hidden.dtype)
    grad_rows = empty((kept + ROW_QUANTUM, hidden.shape[1]), hidden.dtype) if needs[0] else None
    grad_row_weights = hidden.new_empty(kept, dtype=weights.dtype) if needs[1] else None
    grad_up, grad_down = _stacked(gate_up_proj, needs[2]), _stacked(down_proj, needs[3])
    grad_up_bias, grad_down_bias = _stacked(gate_up_bias, needs[4]), _stacked(down_bias, needs[5])
    for e, num_rows in enumerate(sizes):
        if num_rows == 0:
            for grad in (grad_up, grad_down, grad_up_bias, grad_down_bias):
                if grad is not None:
                    grad[e].zero_()
            continue
        start, end, stop = bounds[e], bounds[e + 1], bounds[e] + padded(num_rows)
        up, down = _out_in(gate_up_proj[e], spec), _out_in(down_proj[e], spec)
        x, dy, aw, dh = (b[: stop - start] for b in (x_buffer, dy_buffer, aw_buffer, dh_buffer))
        if stop > end:
            for buffer in (x, dy, aw, dh):
                buffer[num_rows:].zero_()
        torch.index_select(hidden, 0, tokens[start:end], out=x[:num_rows])
        torch.index_select(grad_out, 0, tokens[start:end], out=dy[:num_rows])
        w = row_weights[start:end]
        if preactivation.numel() == 0:
            h = product(x, up, None if gate_up_bias is None else gate_up_bias[e])[:num_rows]
        else:
            h = preactivation[start:end]
        a = activate(h, spec)
        da = product(dy, down.T)[:num_rows]
        if grad_row_weights is not None:
            dot = torch.linalg.vecdot(da, a)
            if down_bias is not None:
                dot += torch.mv(dy[:num_rows], down_bias[e])
            grad_row_weights[start:end] = dot
        if grad_down is not None:
            torch.mul(a, w, out=aw[:num_rows])
            _outer(aw, dy, grad_down[e], spec)
        if grad_down_bias is not None:
            grad_down_bias[e] = (dy[:num_rows] * w).sum(0)
        activate_backward(da.mul_(w), h, spec, dh[:num_rows])
        if grad_up is not None:
            _outer(x, dh, grad_up[e], spec)
        if grad_up_bias is not None:
            grad_up_bias[e] = dh.sum(0)
        if grad_rows is not None:
            product(dh, up.T, out=grad_rows[start:stop])
    grad_weights = None
    if grad_row_weights is not None:
        grad_weights = torch.zeros_like(weights, memory_format=torch.contiguous_format)
        grad_weights.view(-1)[source[:kept].long()] = grad_row_weights
    return (
        None if grad_rows is None else _combine(grad_rows, kept, position),
        grad_weights,
        _like(gate_up_proj, grad_up),
        _like(down_proj, grad_down),
        _like(gate_up_bias, grad_up_bias),
        _like(down_bias, grad_down_bias),
    )


def _rows(source: Tensor, weights: Tensor, kept: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Token index and router weight [.., 1] of every kept row, and of some padding rows past them (of any token)."""
    slots = torch.where(source[:kept] < 0, 0, source[:kept])
    slots = F.pad(slots, (0, ROW_QUANTUM))
    return slots // top_k, weights.reshape(-1).index_select(0, slots)[:, None]


def _width(gate_up: Tensor, spec: ExpertSpec) -> int:
    return gate_up.shape[1] if spec.is_transposed else gate_up.shape[0]


def _out_in(weight: Tensor, spec: ExpertSpec) -> Tensor:
    """One expert's projection as [out, in], a view."""
    return weight.T if spec.is_transposed else weight


def _outer(x_mI: Tensor, dy_mO: Tensor, out: Tensor, spec: ExpertSpec) -> None:
    """Writes the gradient of a projection, given its input and the gradient of its output."""
    if spec.is_transposed:
        product(x_mI.T, dy_mO.T, out=out)
    else:
        product(dy_mO.T, x_mI.T, out=out)


def _combine(rows: Tensor, kept: int, position: Tensor) -> Tensor:
    """Sum of each token's rows, in choice order, in fp32 (fp64 for fp64). Row `kept` is set to zero, for dropped choices."""
    if position.numel() == 0:
        return rows.new_zeros(position.shape[0], rows.shape[1])
    rows[kept] = 0
    return F.embedding_bag(torch.where(position < 0, kept, position), rows, mode="sum")


def _stacked(weights: Weights | None, needed: bool) -> Tensor | None:
    """Memory for the gradient of stacked weights, or of a sequence of them."""
    if weights is None or not needed:
        return None
    return empty((len(weights), *weights[0].shape), weights[0].dtype)


def _like(weights: Weights | None, grad: Tensor | None) -> Weights | None:
    """The stacked gradient as the weights were given: a tensor, or a list of one view per expert."""
    return grad if grad is None or isinstance(weights, Tensor) else list(grad.unbind(0))
