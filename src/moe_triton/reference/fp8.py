"""The definition of the experts with fp8 products, forward and backward (DeepSeek-V3, arXiv 2412.19437, section 3.3).

Both operands of every product with a projection are rounded to e4m3 (`quantization.fp8`): rows in groups of 1 x 128
along the contraction, projections in blocks of 128 x 128 of the tensor as it lies, which serve both directions. For a
projection's gradient, where an expert's rows are contracted, both operands are rounded anew in groups of 128 x 1, which
begin at the expert's first row. What is rounded is what is stored in the hidden states' dtype, but for the activation,
which is rounded as it is computed. Router, biases and adapters are as they are.

In MXFP8 (`fp8="mxfp8"`; OCP Microscaling Formats v1.0) groups are 32 along the contraction of every operand, so that a
projection is rounded anew for each direction, and scales are powers of two.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_triton.quantization.fp8 import BLOCKWISE, MXFP8, Recipe
from moe_triton.records import ExpertCall, ExpertParameters
from moe_triton.reference import activate, adapted

WIDE = torch.float64


class Fp8Product(torch.autograd.Function):
    """w (x W^T) of one expert's rows x [m, in], its projection W [out, in] and factors w [m], all float64.

    The gradients are not those of this function, but the products that fp8 training takes in their place:
    dx = w (dy W), dw = <dy W, x>, dW = dy^T (w x), with their operands in fp8; w x is stored in `dtype` before.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, factors: Tensor, dtype: torch.dtype, recipe: Recipe) -> Tensor:
        return factors[:, None] * (recipe.rows(x, WIDE) @ recipe.projection(weight, 1, WIDE).T)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.dtype, ctx.recipe = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, weight, factors), recipe = grads, ctx.saved_tensors, ctx.recipe
        dx = recipe.rows(dy, WIDE) @ recipe.projection(weight, 0, WIDE)
        weighted_x = (factors[:, None] * x).to(ctx.dtype)
        d_weight = recipe.columns(dy, WIDE).T @ recipe.columns(weighted_x, WIDE)
        return factors[:, None] * dx, d_weight, (dx * x).sum(-1), None, None


def moe_experts(call: ExpertCall) -> Tensor:
    """Compute `reference.moe_experts` with fp8 products, [T, d]; differentiate it for the gradients of fp8 training.

    All sums are in float64. The pre-activation and the rows of the output, and their gradients, are stored in the
    hidden states' dtype.
    """
    spec, dispatched, dtype = call.spec, call.dispatched, call.hidden.dtype
    recipe = MXFP8 if spec.microscaled else BLOCKWISE
    hidden_Td, weights_S = call.hidden.double(), call.weights.double().reshape(-1)
    gate_up, down, gate_up_bias, down_bias, *factors = map(_in_float64, call.parameters)
    wide = replace(call, parameters=ExpertParameters(gate_up, down, gate_up_bias, down_bias, *factors))
    out = torch.zeros_like(hidden_Td)
    offsets = dispatched.offsets.tolist()
    for e in range(dispatched.num_experts):
        slots = dispatched.source[offsets[e] : offsets[e + 1]].long()
        tokens, w = slots // dispatched.top_k, weights_S[slots]
        up_of_e, down_of_e = gate_up[e], down[e]
        if spec.is_transposed:
            up_of_e, down_of_e = up_of_e.T, down_of_e.T
        x = hidden_Td[tokens]
        h = adapted(Fp8Product.apply(x, up_of_e, torch.ones_like(w), dtype, recipe), x, wide.gate_up_lora, e)
        if gate_up_bias is not None:
            h = h + gate_up_bias[e]
        a = activate(h.to(dtype).double(), spec.activation, spec.is_concatenated, spec.limit, spec.alpha)
        rows = w[:, None] * adapted(torch.zeros_like(x), a, wide.down_lora, e)
        if down_bias is not None:
            rows = rows + w[:, None] * down_bias[e]
        rows = rows + Fp8Product.apply(a, down_of_e, w, dtype, recipe)
        out = out.index_add(0, tokens, rows.to(dtype).double())
    return out.to(dtype)


def _in_float64(parameter: Any) -> Any:
    if parameter is None or isinstance(parameter, Tensor):
        return parameter if parameter is None else parameter.double()
    return [x.double() for x in parameter]
