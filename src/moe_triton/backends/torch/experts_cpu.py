"""The experts on the CPU: a loop over blocks of rows that stay in cache through all of their products."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton.backends.torch.activations import (
    activate,
    activate_backward,
    activate_by_full_vectors,
    activate_for_backward,
)
from moe_triton.backends.torch.blocks import Block, Layout
from moe_triton.backends.torch.cpu import CpuPolicy, batched_product, invariant_policy, this_cpu
from moe_triton.backends.torch.decoded import Decoded
from moe_triton.backends.torch.memory import empty
from moe_triton.backends.torch.rows import row_slots, scatter_to_slots, sum_rows
from moe_triton.quantization import QuantizedWeight
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

Matrices = Callable[[int | slice], Tensor]  # expert -> its projection as [out, in]; or several experts'


def experts_forward(
    call: ExpertCall, keep_preactivation: bool, policy: CpuPolicy | None = None
) -> tuple[Tensor, Tensor]:
    """Return (out [T, d], pre-activation [S, 2n] or [S, n]) in hidden's dtype; the second is empty [0] if not kept.

    The definition is `moe_triton.reference.moe_experts`.
    """
    hidden, spec, layout, parameters = call.hidden, call.spec, _layout(call, policy, backward=False), call.parameters
    up, down = (_matrices(p, spec, hidden.dtype) for p in parameters[:2])
    up_lora, down_lora = _readable(call.gate_up_lora), _readable(call.down_lora)
    tokens, weights = row_slots(call, layout.row_of_place)
    y = empty((layout.num_places + 1, call.hidden_size), hidden.dtype)
    kept = empty((call.num_rows, call.width), hidden.dtype) if keep_preactivation else None
    for index, block in enumerate(layout.blocks):
        here = block.places
        x = hidden.index_select(0, tokens[here])  # a padding row is some token's here, and nothing reads its results
        h_out = None if kept is None or block.is_padded else kept[block.rows]
        h = _affine(layout, block, x, up, parameters.gate_up_bias, up_lora, h_out)
        if kept is not None and h_out is None:
            layout.collect(index, h, kept)
        a = activate_by_full_vectors(h, spec) if spec.batch_invariant else activate(h, spec)
        rows = _affine(layout, block, a, down, parameters.down_bias, down_lora)
        torch.mul(rows, weights[here], out=y[here])
    out = sum_rows(y, layout.places(call.dispatched.position), zero_row=layout.num_places)
    return out, hidden.new_empty(0) if kept is None else kept


def experts_backward(
    call: ExpertCall, grad_out: Tensor, preactivation: Tensor, wanted: Wanted, policy: CpuPolicy | None = None
) -> ExpertGradients:
    """Return the gradients that are wanted: both halves block by block, so that nothing of size [S, n] is kept.

    An empty `preactivation` is recomputed from hidden. An expert without rows gets zeros; so does the weight of a
    slot that is dropped or skipped. The gradient of a sequence is a list of views of one stacked buffer.
    """
    layout = _layout(call, policy, backward=True)
    work = BlockBuffers(layout, call, grad_out)
    rows = RowsPass(call, layout, preactivation, wanted)
    weights = WeightsPass(call, layout, wanted)
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
    rows = RowsPass(call, layout, preactivation, wanted)
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
    weights = WeightsPass(call, layout, wanted)
    for index, block in enumerate(layout.blocks):
        work.load_tokens(index)
        work.dh[: block.size] = layout.spread(index, row_grads.preactivation)
        work.weighted_a[: block.size] = layout.spread(index, row_grads.weighted_a)
        weights.run(index, work)
    return weights.results()


def combine_rows(rows: Tensor, position: Tensor) -> Tensor:
    """Sum each token's rows [R, d] in the order of position [T, J], where -1 adds nothing: [T, d]."""
    return sum_rows(torch.cat([rows, rows.new_zeros(1, rows.shape[1])]), position, zero_row=rows.shape[0])


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
        self._tokens, self.weights = row_slots(call, layout.row_of_place)
        most = max((block.size for block in layout.blocks), default=0)
        widths = (call.hidden_size, call.hidden_size, call.intermediate_size, call.width)
        self.x, self.dy, self.weighted_a, self.dh = (empty((most, width), call.hidden.dtype) for width in widths)

    def load_tokens(self, index: int) -> None:
        """Gather the x and dy of block `index`."""
        block = self._layout.blocks[index]
        self.up_u = self.down_u = None
        for values, buffer in ((self._hidden, self.x), (self._grad_out, self.dy)):
            here = buffer[: block.size]
            torch.index_select(values, 0, self._tokens[block.places], out=here)
            self._layout.clear(index, here)


class RowsPass:
    """The gradients that belong to rows, block by block: of the hidden states and of the router's weights."""

    def __init__(self, call: ExpertCall, layout: Layout, preactivation: Tensor, wanted: Wanted) -> None:
        self.call, self.layout, self.preactivation = call, layout, preactivation
        up, down = (_matrices(p, call.spec, call.hidden.dtype) for p in call.parameters[:2])
        self.up, self.up_back, self.down_back = up, _transposed(up), _transposed(down)
        self.up_lora, self.down_lora = _readable(call.gate_up_lora), _readable(call.down_lora)
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
        if self.preactivation.numel() > 0:
            h = self.layout.spread(index, self.preactivation)
        else:
            h = _affine(self.layout, block, x, self.up, parameters.gate_up_bias, self.up_lora)
            h = self.layout.clear(index, h)
        a, activated_gate = activate_for_backward(h, spec)
        da = _products(self.layout, block, dy, self.down_back)
        if self.down_lora is not None:
            work.down_u = _narrow(self.layout, block, dy, self.down_lora.b.mT)
            _add_products(self.layout, block, work.down_u, self.down_lora.a.mT, da)
        if self.dw is not None:
            self.dw[here] = torch.linalg.vecdot(da, a)
            if parameters.down_bias is not None:
                for e, part in block.parts:
                    self.dw[here][part] += torch.mv(dy[part], parameters.down_bias[e])
        if need_a:
            torch.mul(a, w, out=weighted_a)
        activate_backward(da.mul_(w), h, activated_gate, spec, dh)
        if self.dx is not None:
            if self.up_lora is None:
                _products(self.layout, block, dh, self.up_back, out=self.dx[here])
            else:
                dx = _products(self.layout, block, dh, self.up_back)
                work.up_u = _narrow(self.layout, block, dh, self.up_lora.b.mT)
                _add_products(self.layout, block, work.up_u, self.up_lora.a.mT, dx)
                self.dx[here] = dx

    def results(self) -> tuple[Tensor | None, Tensor | None]:
        layout, call = self.layout, self.call
        return (
            None
            if self.dx is None
            else sum_rows(self.dx, layout.places(call.dispatched.position), zero_row=layout.num_places),
            None if self.dw is None else scatter_to_slots(call, self.dw.index_select(0, layout.place_of_row)),
        )


class WeightsPass:
    """The gradients of the experts' parameters, block by block."""

    def __init__(self, call: ExpertCall, layout: Layout, wanted: Wanted) -> None:
        self.spec, self.layout, self.parameters = call.spec, layout, call.parameters
        self.scalings = (call.spec.gate_up_scaling, call.spec.down_scaling)
        self.up_lora, self.down_lora = _readable(call.gate_up_lora), _readable(call.down_lora)
        self.grads = [
            _gradient(cast(ExpertWeight, p), layout.blocks) if want else None
            for p, want in zip(self.parameters, wanted.of(self.parameters)[2:], strict=True)
        ]

    def run(self, index: int, work: BlockBuffers) -> None:
        """Adds what the rows in `work` give; all of an expert's rows are in one block."""
        block = self.layout.blocks[index]
        grad_up, grad_down, grad_up_bias, grad_down_bias, *grad_loras = self.grads
        x, dy, weighted_a, dh = (buffer[: block.size] for buffer in (work.x, work.dy, work.weighted_a, work.dh))
        if grad_down is not None:
            _outer_products(self.layout, block, *self._as_laid_out(weighted_a, dy), grad_down)
        if grad_down_bias is not None:
            weighted_dy = dy * work.weights[block.places]
            for e, part in block.parts:
                grad_down_bias[e] = weighted_dy[part].sum(0)
        if grad_up is not None:
            _outer_products(self.layout, block, *self._as_laid_out(x, dh), grad_up)
        if grad_up_bias is not None:
            for e, part in block.parts:
                grad_up_bias[e] = dh[part].sum(0)
        self._adapter(block, self.up_lora, x, dh, work.up_u, *grad_loras[:2])
        self._adapter(block, self.down_lora, weighted_a, dy, work.down_u, *grad_loras[2:])

    def _adapter(
        self,
        block: Block,
        lora: Lora | None,
        x: Tensor,
        dy: Tensor,
        u: Tensor | None,
        grad_a: Tensor | None,
        grad_b: Tensor | None,
    ) -> None:
        """The gradients of one adapter, of whose product x is the input and dy the output's gradient."""
        if lora is None:
            return
        if grad_a is not None:
            u = _narrow(self.layout, block, dy, lora.b.mT) if u is None else u
            _outer_products(self.layout, block, u, x, grad_a)
        if grad_b is not None:
            _outer_products(self.layout, block, dy, _narrow(self.layout, block, x, lora.a), grad_b)

    def _as_laid_out(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of a projection's gradient, first the one that gives its first dimension."""
        return (x, dy) if self.spec.is_transposed else (dy, x)

    def results(self) -> ParameterGradients:
        for grad_b, scaling in zip(self.grads[5::2], self.scalings, strict=True):
            if grad_b is not None and scaling != 1.0:
                grad_b.mul_(scaling)
        return ParameterGradients(*(as_given(p, g) for p, g in zip(self.parameters, self.grads, strict=True)))


def _layout(call: ExpertCall, policy: CpuPolicy | None, *, backward: bool) -> Layout:
    if call.spec.batch_invariant and not backward:
        policy = invariant_policy()
    policy = policy or this_cpu()
    are_stacked = all(p is None or isinstance(p, Tensor) for p in call.parameters)
    most = policy.most_batched(call.hidden.dtype, backward=backward) if are_stacked else 0
    return Layout(call.dispatched.offsets.tolist(), policy, most)


def _matrices(projection: Projection, spec: ExpertSpec, dtype: torch.dtype) -> Matrices | Decoded:
    """The projections as [out, in], views; quantised ones are decoded to `dtype`."""
    if isinstance(projection, QuantizedWeight):
        return Decoded(projection.mT if spec.is_transposed else projection, dtype)
    of = cast(Tensor, projection)  # what is not stacked is never sliced
    return (lambda e: of[e].mT) if spec.is_transposed else (lambda e: of[e])


def _transposed(matrices: Matrices | Decoded) -> Matrices | Decoded:
    return matrices.mT if isinstance(matrices, Decoded) else lambda e: matrices(e).mT


def _products(
    layout: Layout,
    block: Block,
    x_mI: Tensor,
    weight: Matrices | Decoded,
    biases: ExpertWeight | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x @ weight(e).T + bias[e] for the rows of every expert e of the block, [m, O]; `out`: see `CpuPolicy.product`."""
    if block.batch is not None and not isinstance(weight, Decoded):
        count = block.batch.stop - block.batch.start
        x_CmI = x_mI.view(count, -1, x_mI.shape[1])
        bias_CO = cast(Tensor, biases)[block.batch] if biases is not None else None
        out_CmO = None if out is None else out.view(count, -1, out.shape[1])
        return batched_product(x_CmI, weight(block.batch), bias_CO, out_CmO).flatten(0, 1)
    if len(block.parts) == 1:
        e = block.parts[0][0]
        return _product(layout.policy, x_mI, weight, e, biases, out)
    if out is None:
        size = weight.size_out if isinstance(weight, Decoded) else weight(block.parts[0][0]).shape[0]
        out = x_mI.new_empty(x_mI.shape[0], size)
    for e, part in block.parts:
        _product(layout.policy, x_mI[part], weight, e, biases, out[part])
    return out


def _product(
    policy: CpuPolicy,
    x_mI: Tensor,
    weight: Matrices | Decoded,
    expert: int,
    biases: ExpertWeight | None,
    out: Tensor | None,
) -> Tensor:
    """x @ weight(expert).T + bias[expert] for the rows of one expert; `out`: see `CpuPolicy.product`."""
    bias = None if biases is None else biases[expert]
    if isinstance(weight, Decoded):
        return weight.product(policy, x_mI, expert, bias, out)
    return policy.product(x_mI, weight(expert), bias, out)


def _affine(
    layout: Layout,
    block: Block,
    x_mI: Tensor,
    weight: Matrices | Decoded,
    biases: ExpertWeight | None,
    lora: Lora | None,
    out: Tensor | None = None,
) -> Tensor:
    """`_products` with the adapter's part: + scaling * (x @ a(e).T) @ b(e).T."""
    if lora is None:
        return _products(layout, block, x_mI, weight, biases, out)
    y_mO = _products(layout, block, x_mI, weight, biases)
    _add_products(layout, block, _narrow(layout, block, x_mI, lora.a), lora.b, y_mO)
    return y_mO if out is None else out.copy_(y_mO)


def _narrow(layout: Layout, block: Block, x_mI: Tensor, factor_ErI: Tensor) -> Tensor:
    """x @ factor[e].T for the rows of every expert e of the block, [m, r]."""
    return _products(layout, block, x_mI, lambda e: factor_ErI[e])


def _add_products(layout: Layout, block: Block, t_mr: Tensor, factor_EOr: Tensor, y_mO: Tensor) -> None:
    """y += t @ factor[e].T for the rows of every expert e of the block."""
    if block.batch is not None:
        count = block.batch.stop - block.batch.start
        t_Cmr, y_CmO = (rows.view(count, -1, rows.shape[1]) for rows in (t_mr, y_mO))
        y_CmO.baddbmm_(t_Cmr, factor_EOr[block.batch].mT)
        return
    for e, part in block.parts:
        if layout.policy.fixed_rows:
            y_mO[part] += layout.policy.product(t_mr[part], factor_EOr[e])
        else:
            y_mO[part].addmm_(t_mr[part], factor_EOr[e].mT)


def _readable(lora: Lora | None) -> Lora | None:
    """The adapter with factors that a product reads as they lie, and b scaled: PEFT's b has no contiguous dimension."""
    if lora is None:
        return None
    a, b = (x if 1 in x.stride()[1:] else x.contiguous() for x in (lora.a, lora.b))
    return Lora(a, b if lora.scaling == 1.0 else b * lora.scaling)


def _outer_products(layout: Layout, block: Block, left: Tensor, right: Tensor, grad: Tensor) -> None:
    """Writes left.T @ right over the rows of every expert of the block."""
    if block.batch is not None and layout.policy.shapes_recur:
        count = block.batch.stop - block.batch.start
        left_Cmo, right_Cmi = (rows.view(count, -1, rows.shape[1]) for rows in (left, right))
        batched_product(left_Cmo.mT, right_Cmi.mT, out=grad[block.batch])
        return
    for e, part in block.parts:  # a batch would gain less here than summing over the padding costs
        layout.policy.product(left[part].T, right[part].T, out=grad[e])


def _gradient(weights: ExpertWeight | None, blocks: list[Block]) -> Tensor | None:
    """Memory for the gradient of stacked weights, or of a sequence of them; zeros for the experts without rows."""
    if weights is None:
        return None
    grad = empty((len(weights), *weights[0].shape), weights[0].dtype)
    idle = set(range(len(weights))).difference(*([e for e, _ in block.parts] for block in blocks))
    for e in idle:
        grad[e].zero_()
    return grad
