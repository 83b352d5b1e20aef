"""The gate under autograd: what it saves are the hidden states and the weights as they came.

The hidden states go through the gate to whoever takes them next. Their gradient then comes back to the gate's backward,
which adds its own to it where it makes it: as an addend of a product, and not in three passes over [T, d]. It cannot be
the other way round, an addend of the experts' combine, since the gate's gradient follows from that of the router
weights, which the experts' backward makes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_triton import reference, runtime
from moe_triton.autograd.transforms import once_differentiable
from moe_triton.records import GateWanted
from moe_triton.torch_internals import has_no_data, is_transforming

NARROW = (torch.float16, torch.bfloat16)


def run_gate(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, backend: str = "auto", is_plain: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `reference.gate`, differentiable: logits [T, E], and the hidden states for whoever takes them next.

    is_plain: what `runtime.is_plain` says of `hidden`, where it was asked already.
    16-bit hidden states with a gate in fp32 run on the matrix unit where there is one. Others, and torch.func
    transforms, differentiate the definition as it stands.
    """
    is_narrow = hidden.dtype in NARROW and weight.dtype != torch.float64
    name = runtime.choose(backend, hidden.device, hidden.dtype).name if is_narrow else "reference"
    if name != "reference" and (runtime.is_plain(hidden) if is_plain is None else is_plain):
        return runtime.gate_backend(name).gate_forward(hidden, weight, bias), hidden
    with runtime.without_autocast(hidden.device):
        if name == "reference" or (not torch.compiler.is_compiling() and is_transforming()):
            return reference.gate(hidden, weight, bias), hidden
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias)):
            function = _CompiledGate if torch.compiler.is_compiling() else _Gate
            return function.apply(hidden, weight, bias, name)
        if torch.compiler.is_compiling():
            return _gate_op(hidden, weight, bias, name), hidden
        return _forward(hidden, weight, bias, name), hidden


def _forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    if has_no_data(hidden):
        return _gate_op(hidden, weight, bias, backend)
    with runtime.plain_maths(hidden):
        return runtime.gate_backend(backend).gate_forward(hidden, weight, bias)


def _backward(
    grad_logits: Tensor,
    grad_hidden: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias_dtype: torch.dtype,
    backend: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The gradients of hidden, weight and bias; empty where not wanted."""
    if has_no_data(hidden):
        return _gate_backward_op(grad_logits, grad_hidden, hidden, weight, bias_dtype, backend, list(wanted))
    with runtime.plain_maths(hidden):
        backward = runtime.gate_backend(backend).gate_backward
        found = backward(grad_logits, grad_hidden, hidden, weight, GateWanted(*wanted))
    empty = hidden.new_empty(0)
    bias = empty if found.bias is None else found.bias.to(bias_dtype)
    return [empty if found.hidden is None else found.hidden, empty if found.weight is None else found.weight, bias]


def _save(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight)
    ctx.bias_dtype, ctx.backend = weight.dtype if bias is None else bias.dtype, backend


def _differentiate(
    ctx: Any, grad_logits: Tensor | None, grad_hidden: Tensor | None, *, by: Callable[..., Sequence[Tensor]]
) -> tuple[Tensor | None, ...]:
    """One gradient per input of the gate; `by` computes those of hidden, weight and bias."""
    if grad_logits is None:
        return grad_hidden, None, None, None
    hidden, weight = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    found = by(grad_logits, grad_hidden, hidden, weight, ctx.bias_dtype, ctx.backend, wanted)
    return (*(gradient if want else None for gradient, want in zip(found, wanted, strict=True)), None)


class _Gate(torch.autograd.Function):
    """The eager path: it bypasses the dispatcher of torch.library, which costs tens of microseconds a call."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
        _save(ctx, hidden, weight, bias, backend)
        return _forward(hidden, weight, bias, backend), hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, *grads, by=_backward)


class _CompiledGate(torch.autograd.Function):
    """The same for torch.compile, which traces both passes: of custom ops."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
        _save(ctx, hidden, weight, bias, backend)
        return _gate_op(hidden, weight, bias, backend), hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, *grads, by=_gate_backward_op)


@torch.library.custom_op("moe_triton::gate", mutates_args=())
def _gate_op(hidden: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return _forward(hidden, weight, bias, backend)


@_gate_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=torch.float32)


@torch.library.custom_op("moe_triton::gate_backward", mutates_args=())
def _gate_backward_op(
    grad_logits: Tensor,
    grad_hidden: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias_dtype: torch.dtype,
    backend: str,
    wanted: list[bool],
) -> list[Tensor]:
    """`_backward`."""
    return _backward(grad_logits, grad_hidden, hidden, weight, bias_dtype, backend, wanted)


@_gate_backward_op.register_fake
def _(
    grad_logits: Tensor,
    grad_hidden: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias_dtype: torch.dtype,
    backend: str,
    wanted: list[bool],
) -> list[Tensor]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dtypes = (hidden.dtype, weight.dtype, bias_dtype)
    return [
        hidden.new_empty(shape if want else (0,), dtype=dtype if want else hidden.dtype)
        for shape, dtype, want in zip(shapes, dtypes, wanted, strict=True)
    ]
