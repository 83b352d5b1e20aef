"""The experts of a model whose gate we do not know: our products, with the model's own gate called between them.

The two products are an opaque operation with its own backward, so that torch.compile sees no graph break and no
gradient is made of one slice of the stacked weights at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton.dispatch import dispatch
from moe_triton.reference import wide


def called_gate_mlp(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    gate: Callable[[Tensor], Tensor],
    *,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    is_transposed: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`moe_triton.moe_mlp` with `gate`, any differentiable function of rows [S, m] -> [S, n], as the activation.

    Shapes and dtypes as in `moe_mlp`, but up_proj [E, m, d] may have any number m of rows, and weights are stacked.
    `gate` sees each assignment's pre-activation once, in expert order, and rows of zeros for the skipped slots.
    `backend` makes the dispatch; the products run in torch. Returns [T, d] in hidden_states' dtype.
    """
    dtype = hidden_states.dtype
    if torch.is_autocast_enabled(hidden_states.device.type):
        compute = torch.get_autocast_dtype(hidden_states.device.type)
        hidden_states, up_proj, down_proj = (x.to(compute) for x in (hidden_states, up_proj, down_proj))
        up_bias, down_bias = (None if x is None else x.to(compute) for x in (up_bias, down_bias))
    plan = dispatch(top_k_index, up_proj.shape[0], backend=backend)
    token_S = plan.source.long().clamp_min(0) // plan.top_k
    h_Sm = grouped_linear(hidden_states[token_S], up_proj, up_bias, plan.offsets, is_transposed)
    a_Sn = gate(h_Sm).to(down_proj.dtype)
    y_Sd = grouped_linear(a_Sn, down_proj, down_bias, plan.offsets, is_transposed)
    kept_TK1 = (plan.position >= 0)[..., None]
    rows_TKd = torch.where(kept_TK1, y_Sd[plan.position.long().clamp_min(0)], 0).to(wide(dtype))
    return (rows_TKd * top_k_weights[..., None]).sum(1).to(dtype)


@torch.library.custom_op("moe_triton::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, is_transposed: bool) -> Tensor:
    """Rows [S, in] in expert order -> [S, out]: each times its expert's weight, plus its bias; zeros past offsets[E].

    weight [E, out, in] ([E, in, out] with `is_transposed`), bias [E, out] or None, offsets [E+1] int32.
    """
    weight_EIO = weight if is_transposed else weight.mT
    if _sync_free(x, weight_EIO):
        expert_S, kept_S1 = _layout(offsets, x.shape[0])
        out = F.grouped_mm(x, weight_EIO, offs=offsets[1:])
        return torch.where(kept_S1, out if bias is None else out + bias[expert_S], 0)
    out = x.new_zeros(x.shape[0], weight_EIO.shape[2])
    for e, start, end in _ranges(offsets):
        torch.mm(x[start:end], weight_EIO[e], out=out[start:end])
        if bias is not None:
            out[start:end] += bias[e]
    return out


@torch.library.custom_op("moe_triton::grouped_linear_backward", mutates_args=())
def grouped_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, is_transposed: bool, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (zeros past offsets[E]), weight and bias (empty [0] without one), zeros for idle experts."""
    weight_EOI = weight.mT if is_transposed else weight
    num_experts = weight.shape[0]
    grad = grad.contiguous()
    grad_bias = weight.new_zeros((num_experts, grad.shape[1]) if has_bias else (0,))
    if _sync_free(grad, weight_EOI):
        expert_S, kept_S1 = _layout(offsets, x.shape[0])
        grad_x = torch.where(kept_S1, F.grouped_mm(grad, weight_EOI, offs=offsets[1:]), 0)
        grad, x = torch.where(kept_S1, grad, 0), torch.where(kept_S1, x, 0)
        left, right = (x, grad) if is_transposed else (grad, x)
        grad_weight = F.grouped_mm(left.T, right, offs=offsets[1:])
        if has_bias:
            one_hot_SE = expert_S[:, None] == torch.arange(num_experts, device=x.device)
            grad_bias = (one_hot_SE.T.float() @ grad.float()).to(weight.dtype)
        return grad_x, grad_weight, grad_bias
    grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
    grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    for e, start, end in _ranges(offsets):
        rows, grad_rows = x[start:end], grad[start:end]
        left, right = (rows, grad_rows) if is_transposed else (grad_rows, rows)
        torch.mm(grad_rows, weight_EOI[e], out=grad_x[start:end])
        torch.mm(left.T, right, out=grad_weight[e])
        if has_bias:
            grad_bias[e] = grad_rows.sum(0, dtype=wide(grad.dtype))
    return grad_x, grad_weight, grad_bias


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, is_transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2 if is_transposed else 1])


@grouped_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, is_transposed: bool, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    bias = (weight.shape[0], grad.shape[1]) if has_bias else (0,)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, offsets, is_transposed = inputs
    ctx.save_for_backward(x, weight, offsets)
    ctx.is_transposed, ctx.has_bias = is_transposed, bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = grouped_linear_backward(grad, x, weight, offsets, ctx.is_transposed, ctx.has_bias)
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None, None


grouped_linear.register_autograd(_backward, setup_context=_setup_context)


def _sync_free(a: Tensor, b: Tensor) -> bool:
    """grouped_mm spares a GPU the host sync, but only in bf16 with rows that are multiples of 16 bytes."""
    return a.is_cuda and a.dtype == torch.bfloat16 and all(size % 8 == 0 for size in (*a.shape[1:], *b.shape[1:]))


def _layout(offsets: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Of every row: its expert [S] (the last one past offsets[E]), and whether it is kept [S, 1]."""
    row_S = torch.arange(num_rows, device=offsets.device, dtype=offsets.dtype)
    expert_S = torch.searchsorted(offsets[1:], row_S, right=True).clamp_max(offsets.shape[0] - 2)
    return expert_S, (row_S < offsets[-1])[:, None]


def _ranges(offsets: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, end) of the experts that have rows; a host sync where the offsets are on a GPU."""
    return [(e, start, end) for e, (start, end) in enumerate(pairwise(offsets.tolist())) if start < end]
