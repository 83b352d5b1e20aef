"""The linear map of every expert under autograd, for a model that calls its own gate between two of them.

It is an opaque operation with its own backward, so that torch.compile sees no graph break and no gradient is made of
one slice of the stacked weights at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_triton.backends.torch.grouped import GroupedRows, grouped_outer, grouped_product, sum_per_expert


@torch.library.custom_op("moe_triton::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, is_transposed: bool) -> Tensor:
    """Multiply rows [S, in] in expert order by their expert's weight and add its bias: [S, out]; 0 past offsets[E].

    weight [E, out, in] ([E, in, out] with `is_transposed`), bias [E, out] or None, offsets [E+1] int32.
    """
    rows = GroupedRows(offsets, x.shape[0])
    out = grouped_product(x, weight if is_transposed else weight.mT, rows)
    return torch.where(rows.kept_S1, out if bias is None else out + bias[rows.expert_S], 0)


@torch.library.custom_op("moe_triton::grouped_linear_backward", mutates_args=())
def grouped_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, is_transposed: bool, wants_weight: bool, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x (0 past offsets[E]), weight and bias: 0 for idle experts, [0] where not wanted."""
    rows, grad = GroupedRows(offsets, x.shape[0]), grad.contiguous()
    grad_x = grouped_product(grad, weight.mT if is_transposed else weight, rows)
    left, right = (x, grad) if is_transposed else (grad, x)
    grad_weight = grouped_outer(left, right, rows) if wants_weight else weight.new_empty(0)
    grad_bias = sum_per_expert(grad, rows) if wants_bias else weight.new_empty(0)
    return torch.where(rows.kept_S1, grad_x, 0), grad_weight, grad_bias


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, is_transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2 if is_transposed else 1])


@grouped_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, is_transposed: bool, wants_weight: bool, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    bias = (weight.shape[0], grad.shape[1]) if wants_bias else (0,)
    return x.new_empty(x.shape), weight.new_empty(weight.shape if wants_weight else (0,)), weight.new_empty(bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, offsets, is_transposed = inputs
    ctx.save_for_backward(x, weight, offsets)
    ctx.is_transposed = is_transposed


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets = ctx.saved_tensors
    _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
    grad_x, grad_weight, grad_bias = grouped_linear_backward(
        grad, x, weight, offsets, ctx.is_transposed, wants_weight, wants_bias
    )
    return grad_x, grad_weight if wants_weight else None, grad_bias if wants_bias else None, None, None


grouped_linear.register_autograd(_backward, setup_context=_setup_context)
