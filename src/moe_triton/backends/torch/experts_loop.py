"""The experts on the CPU: a loop over blocks of rows that stay in cache through all of their products.

A block is one expert's rows, or those of consecutive experts that have a few each: then only the products are made
expert by expert, and the cost of the other calls is shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from moe_triton.backends.torch.activations import activate, activate_backward, activate_for_backward
from moe_triton.backends.torch.cpu import ROW_QUANTUM, padded, product
from moe_triton.backends.torch.memory import empty
from moe_triton.backends.torch.operands import Gradients, Needs, Operands, Weights, as_given, sum_rows
from moe_triton.records import ExpertSpec

SHARED_BLOCK_ROWS = 256  # the most rows of a block of several experts

ByExpert = Callable[[int], Tensor]


@dataclass
class Block:
    """Rows [start, start + size) of the dispatch; `computed` counts them with the padding that follows them.

    parts: the block's experts, each with its rows counted from `start`; those of a lone expert include the padding.
    """

    start: int
    size: int
    parts: list[tuple[int, slice]]

    @property
    def computed(self) -> int:
        return padded(self.size) if len(self.parts) == 1 else self.size


def forward(operands: Operands, bounds: list[int], keep_preactivation: bool) -> tuple[Tensor, Tensor]:
    """`experts_forward`, given the offsets as a list."""
    hidden, spec, kept = operands.hidden, operands.spec, bounds[-1]
    up, down = _projection(operands.gate_up_proj, spec), _projection(operands.down_proj, spec)
    up_bias, down_bias = operands.gate_up_bias, operands.down_bias
    # The rows that pad a block are the next one's, and are overwritten when its turn comes. Few rows need none.
    tokens, weights = operands.row_slots(kept, padding=min(kept, ROW_QUANTUM))
    rows = empty((kept + ROW_QUANTUM, operands.hidden_size), hidden.dtype)
    num_slots = operands.source.shape[0]
    preactivation = empty((num_slots + ROW_QUANTUM, operands.width), hidden.dtype) if keep_preactivation else None
    for block in _blocks(bounds):
        here = slice(block.start, block.start + block.computed)
        x = hidden.index_select(0, tokens[here])
        h = _products(block, x, up, up_bias, None if preactivation is None else preactivation[here])
        y = _products(block, activate(h, spec), down, down_bias)
        torch.mul(y, weights[here], out=rows[here])
    out = sum_rows(rows, operands.position, zero_row=kept)
    return out, hidden.new_empty(0) if preactivation is None else preactivation[:num_slots]


def backward(operands: Operands, bounds: list[int], grad_out: Tensor, preactivation: Tensor, needs: Needs) -> Gradients:
    """`experts_backward`, given the offsets as a list."""
    hidden, spec, kept = operands.hidden, operands.spec, bounds[-1]
    up, down = _projection(operands.gate_up_proj, spec), _projection(operands.down_proj, spec)
    up_bias, down_bias = operands.gate_up_bias, operands.down_bias
    tokens, weights = operands.row_slots(kept)
    blocks = _blocks(bounds)
    # One block's rows and zeros as its padding: x, dy, the weighted activation, and the pre-activation's gradient.
    most = max((block.computed for block in blocks), default=0)
    widths = (operands.hidden_size, operands.hidden_size, operands.intermediate_size, operands.width)
    buffers = [empty((most, width), hidden.dtype) for width in widths]
    grad_rows = empty((kept + ROW_QUANTUM, operands.hidden_size), hidden.dtype) if needs[0] else None
    grad_row_weights = weights.new_empty(kept) if needs[1] else None
    parameters = (operands.gate_up_proj, operands.down_proj, up_bias, down_bias)
    grads = [_gradient(p, bounds) if need else None for p, need in zip(parameters, needs[2:], strict=True)]
    grad_up, grad_down, grad_up_bias, grad_down_bias = grads

    for block in blocks:
        size, here = block.size, slice(block.start, block.start + block.size)
        x, dy, weighted_a, dh = (buffer[: block.computed] for buffer in buffers)
        if size < block.computed:
            for buffer in (x, dy, weighted_a, dh):
                buffer[size:].zero_()
        torch.index_select(hidden, 0, tokens[here], out=x[:size])
        torch.index_select(grad_out, 0, tokens[here], out=dy[:size])
        w = weights[here]
        h = preactivation[here] if preactivation.numel() > 0 else _products(block, x, up, up_bias)[:size]
        a, activated_gate = activate_for_backward(h, spec)
        da = _products(block, dy, lambda e: down(e).T)[:size]
        if grad_row_weights is not None:
            grad_row_weights[here] = torch.linalg.vecdot(da, a)
            if down_bias is not None:
                grad_row_weights[here] += _products(block, dy, _row_vector(down_bias))[:size, 0]
        if grad_down is not None:
            torch.mul(a, w, out=weighted_a[:size])
            for e, part in block.parts:
                _outer(weighted_a[part], dy[part], grad_down[e], spec)
        if grad_down_bias is not None:
            weighted_dy = dy[:size] * w
            for e, part in block.parts:
                grad_down_bias[e] = weighted_dy[part].sum(0)
        activate_backward(da.mul_(w), h, activated_gate, spec, dh[:size])
        if grad_up is not None:
            for e, part in block.parts:
                _outer(x[part], dh[part], grad_up[e], spec)
        if grad_up_bias is not None:
            for e, part in block.parts:
                grad_up_bias[e] = dh[part].sum(0)
        if grad_rows is not None:
            spilling = slice(block.start, block.start + block.computed)
            _products(block, dh, lambda e: up(e).T, out=grad_rows[spilling])
    return (
        None if grad_rows is None else sum_rows(grad_rows, operands.position, zero_row=kept),
        None if grad_row_weights is None else operands.scatter_to_slots(grad_row_weights),
        as_given(operands.gate_up_proj, grad_up),
        as_given(operands.down_proj, grad_down),
        as_given(up_bias, grad_up_bias),
        as_given(down_bias, grad_down_bias),
    )


def _blocks(bounds: list[int]) -> list[Block]:
    """The kept rows in order, as blocks. Only experts whose rows need no padding share a block."""
    blocks: list[Block] = []
    for e, (start, end) in enumerate(pairwise(bounds)):
        size = end - start
        if size == 0:
            continue
        last = blocks[-1] if blocks else None
        if (
            last is not None
            and (len(last.parts) > 1 or last.size <= ROW_QUANTUM)
            and size <= ROW_QUANTUM
            and last.size + size <= SHARED_BLOCK_ROWS
        ):
            last.parts.append((e, slice(last.size, last.size + size)))
            last.size += size
        else:
            blocks.append(Block(start, size, [(e, slice(0, padded(size)))]))
    return blocks


def _products(
    block: Block, x_mI: Tensor, weight: ByExpert, biases: Weights | None = None, out: Tensor | None = None
) -> Tensor:
    """x @ weight(e).T + bias[e] for the rows of every expert e of the block, [m, O]. See `product` for `out`."""
    if len(block.parts) == 1:
        e = block.parts[0][0]
        return product(x_mI, weight(e), None if biases is None else biases[e], out)
    if out is None:
        out = x_mI.new_empty(x_mI.shape[0], weight(block.parts[0][0]).shape[0])
    sizes = [part.stop - part.start for _, part in block.parts]
    for (e, _), x, y in zip(block.parts, x_mI.split(sizes), out.split(sizes), strict=True):
        product(x, weight(e), None if biases is None else biases[e], y)
    return out


def _projection(weights: Weights, spec: ExpertSpec) -> ByExpert:
    """Expert -> its projection as [out, in], a view."""
    return (lambda e: weights[e].T) if spec.is_transposed else (lambda e: weights[e])


def _row_vector(vectors: Weights) -> ByExpert:
    """Expert -> its vector as [1, length], a view."""
    return lambda e: vectors[e][None]


def _outer(x_mI: Tensor, dy_mO: Tensor, out: Tensor, spec: ExpertSpec) -> None:
    """Writes the gradient of a projection, given its input and the gradient of its output."""
    if spec.is_transposed:
        product(x_mI.T, dy_mO.T, out=out)
    else:
        product(dy_mO.T, x_mI.T, out=out)


def _gradient(weights: Weights | None, bounds: list[int]) -> Tensor | None:
    """Memory for the gradient of stacked weights, or of a sequence of them; zeros for the experts without rows."""
    if weights is None:
        return None
    grad = empty((len(weights), *weights[0].shape), weights[0].dtype)
    for e, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            grad[e].zero_()
    return grad
