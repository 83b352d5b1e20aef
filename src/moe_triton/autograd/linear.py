"""Linear maps and functions of rows that are batch invariant where `moe_triton.batch_invariant` asks for it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_triton import runtime
from moe_triton.torch_internals import by_full_vectors


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str = "auto") -> Tensor:
    """Compute `F.linear` of rows x [T, in]; inside `batch_invariant` such that a row's bits depend on it alone."""
    if not runtime.is_batch_invariant():
        return F.linear(x, weight, bias)
    compute = runtime.autocast_dtype(x.device)
    if compute is not None:
        x, weight, bias = x.to(compute), weight.to(compute), None if bias is None else bias.to(compute)
    name = runtime.choose(backend, x.device, x.dtype).name
    runtime.refuse_reference(name)
    return _linear_op(x, weight, bias, name)


def apply_linear(module: nn.Module, x: Tensor, backend: str = "auto") -> Tensor:
    """Call a module; `linear` with its parameters where it is an nn.Linear and not a wrapper of one."""
    if runtime.is_batch_invariant() and type(module) is nn.Linear:
        return linear(x, module.weight, module.bias, backend)
    return module(x)


def sigmoid(x: Tensor) -> Tensor:
    """Compute `torch.sigmoid` of [T, n]; inside `batch_invariant` such that a result's bits depend on one element."""
    return _row_function_op(x, "sigmoid") if runtime.is_batch_invariant() else torch.sigmoid(x)


def softmax(x: Tensor) -> Tensor:
    """Compute the softmax of each row of [T, n]; inside `batch_invariant` also where a compiler would fuse it."""
    return _row_function_op(x, "softmax") if runtime.is_batch_invariant() else torch.softmax(x, dim=-1)


@torch.library.custom_op("moe_triton::linear", mutates_args=())
def _linear_op(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    with runtime.plain_maths(x):
        return runtime.experts_backend(backend, x.device).linear(x, weight, bias)


@_linear_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
    return (
        grad @ weight if wants_x else None,
        grad.T @ x if wants_weight else None,
        grad.sum(0) if wants_bias else None,
        None,
    )


_linear_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("moe_triton::row_function", mutates_args=())
def _row_function_op(x: Tensor, name: str) -> Tensor:
    with runtime.plain_maths(x):
        return torch.softmax(x, dim=-1) if name == "softmax" else by_full_vectors(torch.sigmoid, x)


@_row_function_op.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


def _setup_row_function(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.name = inputs[1]
    ctx.save_for_backward(output)


def _row_function_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (y,) = ctx.saved_tensors
    if ctx.name == "softmax":
        return y * (grad - (grad * y).sum(-1, keepdim=True)), None
    return grad * y * (1 - y), None


_row_function_op.register_autograd(_row_function_backward, setup_context=_setup_row_function)
