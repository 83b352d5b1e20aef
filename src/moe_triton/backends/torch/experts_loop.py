"""The experts on the CPU: a loop over blocks of rows that stay in cache through all of their products.

A block is one expert's rows, or those of consecutive experts that have few enough together and need no padding: then
only the products are made expert by expert, and the cost of the other calls is shared.
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
    blocks = _blocks(bounds)
    work = BlockBuffers.for_blocks(blocks, operands)
    rows = RowGradients(operands, bounds, grad_out, preactivation, needs)
    weights = WeightGradients(operands, bounds, needs)
    for block in blocks:
        rows.run(block, work, need_a=needs[3])
        weights.run(block, work)
    return (*rows.results(), *weights.results())


def backward_rows(
    operands: Operands, bounds: list[int], grad_out: Tensor, preactivation: Tensor, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """`experts_backward_rows`, given the offsets as a list."""
    hidden, num_rows = operands.hidden, operands.source.shape[0]
    blocks = _blocks(bounds)
    work = BlockBuffers.for_blocks(blocks, operands)
    rows = RowGradients(operands, bounds, grad_out, preactivation, needs)
    grad_h = empty((num_rows, operands.width), hidden.dtype)
    weighted_a = empty((num_rows, operands.intermediate_size), hidden.dtype)
    for block in blocks:
        rows.run(block, work, need_a=True)
        here = slice(block.start, block.start + block.size)
        grad_h[here] = work.dh[: block.size]
        weighted_a[here] = work.weighted_a[: block.size]
    return (*rows.results(), grad_h, weighted_a)


def backward_weights(
    operands: Operands, bounds: list[int], grad_out: Tensor, grad_h: Tensor, weighted_a: Tensor, needs: Needs
) -> tuple[Weights | None, Weights | None, Weights | None, Weights | None]:
    """`experts_backward_weights`, given the offsets as a list."""
    blocks = _blocks(bounds)
    work = BlockBuffers.for_blocks(blocks, operands)
    weights = WeightGradients(operands, bounds, needs)
    for block in blocks:
        here = slice(block.start, block.start + block.size)
        work.load_tokens(block, operands.hidden, grad_out, weights.tokens)
        work.dh[: block.size] = grad_h[here]
        work.weighted_a[: block.size] = weighted_a[here]
        weights.run(block, work)
    return weights.results()


@dataclass
class BlockBuffers:
    """One block's rows, and zeros as its padding: x, dy, the weighted activation and the pre-activation's gradient."""

    x: Tensor
    dy: Tensor
    weighted_a: Tensor
    dh: Tensor

    @classmethod
    def for_blocks(cls, blocks: list[Block], operands: Operands) -> BlockBuffers:
        most = max((block.computed for block in blocks), default=0)
        widths = (operands.hidden_size, operands.hidden_size, operands.intermediate_size, operands.width)
        return cls(*(empty((most, width), operands.hidden.dtype) for width in widths))

    def load_tokens(self, block: Block, hidden: Tensor, grad_out: Tensor, tokens: Tensor) -> None:
        """Gather the block's x and dy, and clear the padding of all four."""
        here = slice(block.start, block.start + block.size)
        if block.computed > block.size:
            for buffer in (self.x, self.dy, self.weighted_a, self.dh):
                buffer[block.size : block.computed].zero_()
        torch.index_select(hidden, 0, tokens[here], out=self.x[: block.size])
        torch.index_select(grad_out, 0, tokens[here], out=self.dy[: block.size])


class RowGradients:
    """The gradients that belong to rows, block by block: of the hidden states and of the router's weights."""

    def __init__(
        self, operands: Operands, bounds: list[int], grad_out: Tensor, preactivation: Tensor, needs: Needs
    ) -> None:
        self.operands, self.grad_out, self.preactivation, self.kept = operands, grad_out, preactivation, bounds[-1]
        self.up, self.down = (_projection(p, operands.spec) for p in (operands.gate_up_proj, operands.down_proj))
        self.tokens, self.weights = operands.row_slots(self.kept)
        shape = (self.kept + ROW_QUANTUM, operands.hidden_size)
        self.grad_rows = empty(shape, operands.hidden.dtype) if needs[0] else None
        self.grad_row_weights = operands.weights.new_empty(self.kept) if needs[1] else None

    def run(self, block: Block, work: BlockBuffers, *, need_a: bool) -> None:
        """Leaves the block's x, dy, dh, and if asked the weighted activation, in `work`."""
        operands, spec, size = self.operands, self.operands.spec, block.size
        here = slice(block.start, block.start + size)
        work.load_tokens(block, operands.hidden, self.grad_out, self.tokens)
        x, dy, dh = (buffer[: block.computed] for buffer in (work.x, work.dy, work.dh))
        w = self.weights[here]
        if self.preactivation.numel() > 0:
            h = self.preactivation[here]
        else:
            h = _products(block, x, self.up, operands.gate_up_bias)[:size]
        a, activated_gate = activate_for_backward(h, spec)
        da = _products(block, dy, lambda e: self.down(e).T)[:size]
        if self.grad_row_weights is not None:
            self.grad_row_weights[here] = torch.linalg.vecdot(da, a)
            if operands.down_bias is not None:
                for e, part in block.parts:
                    rows = slice(part.start, min(part.stop, size))
                    self.grad_row_weights[here][rows] += torch.mv(dy[rows], operands.down_bias[e])
        if need_a:
            torch.mul(a, w, out=work.weighted_a[:size])
        activate_backward(da.mul_(w), h, activated_gate, spec, dh[:size])
        if self.grad_rows is not None:
            spilling = slice(block.start, block.start + block.computed)
            _products(block, dh, lambda e: self.up(e).T, out=self.grad_rows[spilling])

    def results(self) -> tuple[Tensor | None, Tensor | None]:
        rows, row_weights = self.grad_rows, self.grad_row_weights
        return (
            None if rows is None else sum_rows(rows, self.operands.position, zero_row=self.kept),
            None if row_weights is None else self.operands.scatter_to_slots(row_weights),
        )


class WeightGradients:
    """The gradients of the experts' parameters, block by block."""

    def __init__(self, operands: Operands, bounds: list[int], needs: Needs) -> None:
        self.spec = operands.spec
        self.tokens, self.weights = operands.row_slots(bounds[-1])
        self.parameters = (
            operands.gate_up_proj, operands.down_proj, operands.gate_up_bias, operands.down_bias,
        )  # fmt: skip
        self.grads = [
            _gradient(p, bounds) if need else None for p, need in zip(self.parameters, needs[2:], strict=True)
        ]

    def run(self, block: Block, work: BlockBuffers) -> None:
        """Adds what the rows in `work` give; all of an expert's rows are in one block."""
        grad_up, grad_down, grad_up_bias, grad_down_bias = self.grads
        x, dy, weighted_a, dh = work.x, work.dy, work.weighted_a, work.dh
        if grad_down is not None:
            for e, part in block.parts:
                _outer(weighted_a[part], dy[part], grad_down[e], self.spec)
        if grad_down_bias is not None:
            weighted_dy = dy[: block.size] * self.weights[block.start : block.start + block.size]
            for e, part in block.parts:
                grad_down_bias[e] = weighted_dy[part].sum(0)
        if grad_up is not None:
            for e, part in block.parts:
                _outer(x[part], dh[part], grad_up[e], self.spec)
        if grad_up_bias is not None:
            for e, part in block.parts:
                grad_up_bias[e] = dh[part].sum(0)

    def results(self) -> tuple[Weights | None, Weights | None, Weights | None, Weights | None]:
        up, down, up_bias, down_bias = (as_given(p, g) for p, g in zip(self.parameters, self.grads, strict=True))
        return up, down, up_bias, down_bias


def _blocks(bounds: list[int]) -> list[Block]:
    """The kept rows in order, as blocks. Experts whose rows need no padding share one that stays in cache."""
    blocks: list[Block] = []
    for e, (start, end) in enumerate(pairwise(bounds)):
        size = end - start
        if size == 0:
            continue
        last = blocks[-1] if blocks else None
        if (
            last is not None
            and last.computed == last.size
            and padded(size) == size
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
