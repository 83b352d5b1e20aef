"""The experts on the CPU: a loop over blocks of rows, so that what lies between their products is small."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton.backends.torch import looped, small_experts
from moe_triton.backends.torch.activations import activate_by_full_vectors
from moe_triton.backends.torch.adapters import Adapters, adapters_of, affine, affine_back
from moe_triton.backends.torch.blocks import Layout
from moe_triton.backends.torch.cpu import (
    GROUPED_DTYPES,
    CpuPolicy,
    invariant_policy,
    this_cpu,
)
from moe_triton.backends.torch.decoded import Decoded
from moe_triton.backends.torch.fused import runs_on_threads
from moe_triton.backends.torch.gated_rows import activate_rows, activate_rows_backward
from moe_triton.backends.torch.memory import empty
from moe_triton.backends.torch.products import all_outer_products, matrices, outer_products, transposed
from moe_triton.backends.torch.rows import row_slots, scatter_to_slots, sum_rows, take_rows
from moe_triton.records import (
    ExpertCall,
    ExpertGradients,
    ExpertWeight,
    ParameterGradients,
    RowGradients,
    Wanted,
    as_given,
)

ONE_CALL = 4 << 20  # bytes of a projection's gradients, from which block by block in used memory is faster
# Bytes of the input and the pre-activation of a block of narrow rows. Where loops make the products, threads wait for
# each other at the end of each block's steps, so that fewer blocks take less time, also where they leave the cache.
SHARED_BYTES, LOOPED_BYTES = 1 << 22, 1 << 25


def experts_forward(
    call: ExpertCall, keep_preactivation: bool, policy: CpuPolicy | None = None
) -> tuple[Tensor, Tensor]:
    """Return (out [T, d], pre-activation [S, 2n] or [S, n]) in hidden's dtype; the second is empty [0] if not kept.

    The definition is `moe_triton.reference.moe_experts`.
    """
    if policy is None and small_experts.runs_loops(call):
        return small_experts.experts_forward(call, keep_preactivation)
    hidden, spec, layout, parameters = call.hidden, call.spec, _layout(call, policy, backward=False), call.parameters
    up, down = (matrices(p, spec, hidden.dtype) for p in parameters[:2])
    up_lora, down_lora = adapters_of(call, layout)
    tokens, weights = row_slots(call, layout.num_rows, layout.row_of_place)
    weighs = runs_on_threads(hidden.dtype)  # a loop that sums rows; else they are multiplied before
    slot_weights = call.weights if weighs else None
    # every choice has a row; a Dispatch that an exchange has shortened has fewer rows than choices
    if layout.is_one_block and layout.num_rows == call.num_rows == call.dispatched.position.numel():
        h = affine(layout, layout.blocks[0], hidden.index_select(0, tokens), up, parameters.gate_up_bias, up_lora)
        a = activate_by_full_vectors(h, spec) if spec.batch_invariant else activate_rows(h, spec)
        y = affine(layout, layout.blocks[0], a, down, parameters.down_bias, down_lora)
        out = sum_rows(y if weighs else y.mul_(weights), call.dispatched.position, weights=slot_weights)
        return out, h if keep_preactivation else hidden.new_empty(0)
    y = empty((layout.num_places + 1, call.hidden_size), hidden.dtype)
    kept = empty((call.num_rows, call.width), hidden.dtype) if keep_preactivation else None
    buffer = empty((layout.most_places, call.hidden_size), hidden.dtype)
    for index, block in enumerate(layout.blocks):
        here = block.places
        x = buffer[: block.size]
        take_rows(hidden, tokens[here], x)  # a padding row is some token's here, and nothing reads its results
        h_out = None if kept is None else layout.room(index, kept)
        h = affine(layout, block, x, up, parameters.gate_up_bias, up_lora, h_out)
        if kept is not None and h_out is None:
            layout.collect(index, h, kept)
        a = activate_by_full_vectors(h, spec) if spec.batch_invariant else activate_rows(h, spec)
        rows = affine(layout, block, a, down, parameters.down_bias, down_lora, y[here] if weighs else None)
        if not weighs:
            torch.mul(rows, weights[here], out=y[here])
    out = sum_rows(y, layout.places(call.dispatched.position), layout.num_places, slot_weights)
    return out, hidden.new_empty(0) if kept is None else kept


def experts_backward(
    call: ExpertCall, grad_out: Tensor, preactivation: Tensor, wanted: Wanted, policy: CpuPolicy | None = None
) -> ExpertGradients:
    """Return the gradients that are wanted: both halves block by block, so that nothing of size [S, n] is kept.

    An empty `preactivation` is recomputed from hidden. An expert without rows gets zeros; so does the weight of a
    slot that is dropped or skipped. The gradient of a sequence is a list of views of one stacked buffer.
    """
    if policy is None and small_experts.runs_loops(call):
        return small_experts.experts_backward(call, grad_out, preactivation, wanted)
    layout = _layout(call, policy, backward=True)
    work = BlockBuffers(layout, call, grad_out)
    adapters = adapters_of(call, layout)
    rows = RowsPass(call, layout, preactivation, wanted, adapters)
    weights = WeightsPass(call, layout, wanted, adapters)
    for index in range(len(layout.blocks)):
        rows.run(index, work, need_a=wanted.down or wanted.down_lora_a or wanted.down_lora_b)
        weights.run(index, work)
    return ExpertGradients(*rows.results(), *weights.results())


def experts_backward_rows(
    call: ExpertCall, grad_out: Tensor, preactivation: Tensor, wanted: Wanted, policy: CpuPolicy | None = None
) -> RowGradients:
    """Compute the first half of `experts_backward`: what a sender waits for, and what the second half needs of it."""
    layout, dtype = _layout(call, policy, backward=True), call.hidden.dtype
    work = BlockBuffers(layout, call, grad_out)
    rows = RowsPass(call, layout, preactivation, wanted, adapters_of(call, layout))
    grad_h = empty((call.num_rows, call.width), dtype)
    weighted_a = empty((call.num_rows, call.intermediate_size), dtype)
    for index, block in enumerate(layout.blocks):
        rows.run(index, work, need_a=True)
        layout.collect(index, work.dh[: block.size], grad_h)
        layout.collect(index, work.weighted_a[: block.size], weighted_a)
    return RowGradients(*rows.results(), grad_h, weighted_a)


def experts_backward_weights(
    call: ExpertCall, grad_out: Tensor, row_grads: RowGradients, wanted: Wanted, policy: CpuPolicy | None = None
) -> ParameterGradients:
    """Compute the second half of `experts_backward`."""
    layout = _layout(call, policy, backward=True)
    work = BlockBuffers(layout, call, grad_out)
    weights = WeightsPass(call, layout, wanted, adapters_of(call, layout))
    for index, block in enumerate(layout.blocks):
        work.load_tokens(index)
        work.dh[: block.size] = layout.spread(index, row_grads.preactivation)
        work.weighted_a[: block.size] = layout.spread(index, row_grads.weighted_a)
        weights.run(index, work)
    return weights.results()


def combine_rows(rows: Tensor, position: Tensor) -> Tensor:
    """Sum each token's rows [R, d] in the order of position [T, J], where -1 adds nothing: [T, d]."""
    return sum_rows(rows, position, zero_row=rows.shape[0])


def linear(x_mI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Compute x @ weight.T + bias such that a row's bits depend on this row alone, [m, O]."""
    policy, num_rows = invariant_policy(), x_mI.shape[0]
    x_mI = F.pad(x_mI, (0, 0, 0, policy.padded(num_rows) - num_rows))
    return policy.product(x_mI, weight_OI, bias_O)[:num_rows]


class BlockBuffers:
    """What is at one block's places: x, dy, the weighted activation and the pre-activation's gradient; padding is 0.

    weights    the router's, of all places [num_places, 1]
    up_u       the pre-activation's gradient times the adapter's b, scaled; where the rows' gradients took it
    down_u     dy times the adapter's b, scaled; where the rows' gradients took it
    """

    up_u: Tensor | None = None
    down_u: Tensor | None = None

    def __init__(self, layout: Layout, call: ExpertCall, grad_out: Tensor) -> None:
        self._layout, self._hidden, self._grad_out = layout, call.hidden, grad_out
        self._tokens, self.weights = row_slots(call, layout.num_rows, layout.row_of_place)
        most = layout.most_places
        widths = (call.hidden_size, call.hidden_size, call.intermediate_size, call.width)
        self.x, self.dy, self.weighted_a, self.dh = (empty((most, width), call.hidden.dtype) for width in widths)

    def load_tokens(self, index: int) -> None:
        """Gather the x and dy of block `index`."""
        block = self._layout.blocks[index]
        self.up_u = self.down_u = None
        for values, buffer in ((self._hidden, self.x), (self._grad_out, self.dy)):
            here = buffer[: block.size]
            take_rows(values, self._tokens[block.places], here)
            self._layout.clear(index, here)


class RowsPass:
    """The gradients that belong to rows, block by block: of the hidden states and of the router's weights."""

    def __init__(
        self, call: ExpertCall, layout: Layout, preactivation: Tensor, wanted: Wanted, adapters: Adapters
    ) -> None:
        self.call, self.layout, self.preactivation = call, layout, preactivation
        up, down = (matrices(p, call.spec, call.hidden.dtype) for p in call.parameters[:2])
        self.up, self.up_back, self.down_back = up, transposed(up), transposed(down)
        self.up_lora, self.down_lora = adapters
        shape = (layout.num_places + 1, call.hidden_size)
        self.dx = empty(shape, call.hidden.dtype) if wanted.hidden else None
        self.dw = call.weights.new_empty(layout.num_places) if wanted.weights else None

    def run(self, index: int, work: BlockBuffers, *, need_a: bool) -> None:
        """Leaves the block's x, dy, dh, and if asked the weighted activation, in `work`."""
        parameters, spec, block = self.call.parameters, self.call.spec, self.layout.blocks[index]
        here = block.places
        work.load_tokens(index)
        x, dy, weighted_a, dh = (buffer[: block.size] for buffer in (work.x, work.dy, work.weighted_a, work.dh))
        w = work.weights[here]
        filled = block.filled  # all places, but for padding at the end
        if self.preactivation.numel() > 0:
            h = self.layout.at_filled(index, self.preactivation)
        else:
            h = affine(self.layout, block, x, self.up, parameters.gate_up_bias, self.up_lora)
            h = self.layout.clear(index, h)[:filled]
        da, work.down_u = affine_back(self.layout, block, dy, self.down_back, self.down_lora)
        dw = None if self.dw is None else self.dw[here]
        activate_rows_backward(
            h, da[:filled], w[:filled], spec, dh[:filled], weighted_a[:filled] if need_a else None,
            None if dw is None else dw[:filled],
        )  # fmt: skip
        dh[filled:].zero_()
        weighted_a[filled:].zero_()
        if dw is not None and parameters.down_bias is not None:
            for e, part in block.parts:
                dw[part] += torch.mv(dy[part], parameters.down_bias[e])
        if self.dx is not None:
            _, work.up_u = affine_back(self.layout, block, dh, self.up_back, self.up_lora, self.dx[here])

    def results(self) -> tuple[Tensor | None, Tensor | None]:
        layout, call = self.layout, self.call
        return (
            None
            if self.dx is None
            else sum_rows(self.dx, layout.places(call.dispatched.position), zero_row=layout.num_places),
            None if self.dw is None else scatter_to_slots(call, layout.rows(self.dw)),
        )


class WeightsPass:
    """The gradients of the experts' parameters, block by block."""

    def __init__(self, call: ExpertCall, layout: Layout, wanted: Wanted, adapters: Adapters) -> None:
        self.spec, self.layout, self.parameters = call.spec, layout, call.parameters
        self.up_lora, self.down_lora = adapters
        self.wanted = wanted.of(self.parameters)
        in_one_call, dtype = _makes_gradients_in_one_call(call, layout), call.hidden.dtype
        self.grads = [
            _gradient(cast(ExpertWeight, p), layout, dtype) if want and not (in_one_call and i < 2) else None
            for i, (p, want) in enumerate(zip(self.parameters, self.wanted[2:], strict=True))
        ]

    def run(self, index: int, work: BlockBuffers) -> None:
        """Adds what the rows in `work` give; all of an expert's rows are in one block."""
        block = self.layout.blocks[index]
        grad_up, grad_down, grad_up_bias, grad_down_bias, *grad_loras = self.grads
        x, dy, weighted_a, dh = (buffer[: block.size] for buffer in (work.x, work.dy, work.weighted_a, work.dh))
        if grad_down is not None:
            outer_products(self.layout, block, *self._as_laid_out(weighted_a, dy), grad_down)
        elif self.wanted.down:
            self.grads[1] = all_outer_products(self.layout, *self._as_laid_out(weighted_a, dy))
        if grad_down_bias is not None:
            weighted_dy = dy * work.weights[block.places]
            for e, part in block.parts:
                grad_down_bias[e] = weighted_dy[part].sum(0)
        if grad_up is not None:
            outer_products(self.layout, block, *self._as_laid_out(x, dh), grad_up)
        elif self.wanted.gate_up:
            self.grads[0] = all_outer_products(self.layout, *self._as_laid_out(x, dh))
        if grad_up_bias is not None:
            for e, part in block.parts:
                grad_up_bias[e] = dh[part].sum(0)
        if self.up_lora is not None:
            self.up_lora.gradients(block, x, dh, work.up_u, *grad_loras[:2])
        if self.down_lora is not None:
            self.down_lora.gradients(block, weighted_a, dy, work.down_u, *grad_loras[2:])

    def _as_laid_out(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of a projection's gradient, first the one that gives its first dimension."""
        return (x, dy) if self.spec.is_transposed else (dy, x)

    def results(self) -> ParameterGradients:
        return ParameterGradients(*(as_given(p, g) for p, g in zip(self.parameters, self.grads, strict=True)))


def _layout(call: ExpertCall, policy: CpuPolicy | None, *, backward: bool) -> Layout:
    if call.spec.batch_invariant and not backward:
        policy = invariant_policy()
    policy = policy or this_cpu()
    are_stacked = all(isinstance(p, Tensor) for p in call.parameters if p is not None)
    dtype = call.hidden.dtype
    is_looped = _is_looped(call, policy)
    most = policy.most_batched(dtype, backward=backward) if are_stacked and not is_looped else 0
    # padding is for products whose kernels are compiled for a shape
    flops_per_row = 0 if is_looped else 2 * call.width * call.hidden_size if dtype in policy.linear else math.inf
    groups = are_stacked and dtype in GROUPED_DTYPES and not policy.fixed_rows
    shared_bytes = LOOPED_BYTES if is_looped else SHARED_BYTES
    shared_rows = shared_bytes // max((call.width + call.hidden_size) * dtype.itemsize, 1)
    return Layout(
        call.dispatched.offsets, policy, most, flops_per_row,
        shared_rows=shared_rows, groups=groups, is_looped=is_looped,
    )  # fmt: skip


def _is_looped(call: ExpertCall, policy: CpuPolicy) -> bool:
    """Whether `looped` makes the products."""
    dtype, projections = call.hidden.dtype, call.parameters[:2]
    if call.num_rows == 0 or not policy.loops(dtype) or (policy.fixed_rows and (call.gate_up_lora or call.down_lora)):
        return False
    for projection in projections:
        of = matrices(projection, call.spec, dtype)
        stored = range(1) if isinstance(projection, Tensor) else range(call.num_experts)
        if isinstance(of, Decoded) or not looped.reads([of(e) for e in stored], dtype):
            return False
    return True


def _makes_gradients_in_one_call(call: ExpertCall, layout: Layout) -> bool:
    """Whether `all_outer_products` makes the projections' gradients, with the bits of torch.mm for each expert."""
    if not (layout.groups and layout.is_one_block) or layout.is_looped:
        return False
    sizes = call.hidden_size, call.width, call.intermediate_size
    matrix = call.hidden_size * call.width
    most_rows = max(part.stop - part.start for _, part in layout.blocks[0].parts)
    flops, dtype = 2 * matrix * most_rows, call.hidden.dtype
    is_small = call.num_experts * matrix * dtype.itemsize < ONE_CALL
    return is_small and layout.policy.by_mm(dtype, flops) and not any(size * dtype.itemsize % 16 for size in sizes)


def _gradient(weights: ExpertWeight | None, layout: Layout, dtype: torch.dtype) -> Tensor | None:
    """Memory for the gradient of stacked weights, or of a sequence of them; zeros for the experts without rows.

    dtype: of the hidden states.
    """
    if weights is None:
        return None
    grad = empty((len(weights), *weights[0].shape), weights[0].dtype)
    idle = set(range(len(weights))).difference(*([e for e, _ in block.parts] for block in layout.blocks))
    if layout.is_looped and grad.ndim == 3 and grad.dtype == dtype:
        looped.clear(grad, idle)
    else:
        for e in idle:
            grad[e].zero_()
    return grad
