"""Routing under autograd: one implementation behind an eager Function and a custom op for torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_triton import runtime
from moe_triton.autograd.transforms import TransformedGradient, call_per_sample, once_differentiable, refuse_jvp
from moe_triton.records import RouterSpec, TiledDispatch
from moe_triton.reference import wide
from moe_triton.torch_internals import has_no_data, is_transforming

FIELDS = tuple(field.name for field in fields(RouterSpec))


def run_route(
    logits: Tensor,
    choice_bias: Tensor | None,
    noise: Tensor | None,
    token_mask: Tensor | None,
    given: Tensor | None,
    spec: RouterSpec,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, TiledDispatch | None]:
    """(weights, score_sums, z_sum, experts, counts, dispatched), the first three differentiable in the logits.

    given: what `reference.given_choices` returned, or None.
    dispatched: see `Routing`.
    """
    if torch.compiler.is_compiling():
        # A float argument of an op is a constant of its graph: outside, a scale that changes compiles nothing again.
        options = _fields(replace(spec, scale=1.0))
        weights, *rest = _route_op(logits, choice_bias, noise, token_mask, given, *options, backend)
        return weights * spec.scale, *rest, None
    if is_transforming():
        return *_TransformedRoute.apply(logits, choice_bias, noise, token_mask, given, spec, backend), None
    if torch.is_grad_enabled() and logits.requires_grad:
        return _Route.apply(logits, choice_bias, noise, token_mask, given, spec, backend)
    return _forward_and_dispatch(logits, choice_bias, noise, token_mask, given, spec, backend)


def run_inference(
    logits: Tensor,
    choice_bias: Tensor | None,
    noise: Tensor | None,
    given: Tensor | None,
    spec: RouterSpec,
    backend: str,
    is_plain: bool | None = None,
) -> Inference | None:
    """Route where nothing is differentiated, compiled or transformed; None elsewhere, and where that saves nothing.

    is_plain: what `runtime.is_plain` says of the logits, where it was asked already.
    """
    if runtime.is_plain(logits) if is_plain is None else is_plain:
        return _infer(logits, choice_bias, noise, given, spec, backend)
    if torch.compiler.is_compiling() or is_transforming() or has_no_data(logits):
        return None
    if torch.is_grad_enabled() and logits.requires_grad:
        return None
    with runtime.plain_maths(logits):
        return _infer(logits, choice_bias, noise, given, spec, backend)


def _infer(
    logits: Tensor,
    choice_bias: Tensor | None,
    noise: Tensor | None,
    given: Tensor | None,
    spec: RouterSpec,
    backend: str,
) -> Inference | None:
    if spec.sequences > 1:
        return None
    routing = runtime.routing_backend(backend)
    found = routing.route_and_dispatch(logits, spec, choice_bias, noise, None, given)
    if found is not None:
        (experts, weights, *sums), dispatched = found
        return Inference(experts, weights, partial(tuple, sums), dispatched)
    if logits.device.type != "cpu":  # a graph may be captured
        return None
    later = routing.route_unsummed(logits, spec, choice_bias, noise, None, given)
    return None if later is None else Inference(*later)


class Inference(NamedTuple):
    """Experts, weights, what gives (counts, score_sums, z_sum), and the Dispatch where there is one already."""

    experts: Tensor
    weights: Tensor
    sums: Callable[[], tuple[Tensor, ...]]
    dispatched: TiledDispatch | None = None


def _fields(spec: RouterSpec) -> tuple[Any, ...]:
    """A custom op takes plain values only, in the order of the record; `_spec` is the way back."""
    return tuple(getattr(spec, name) for name in FIELDS)


def _forward(
    logits: Tensor,
    choice_bias: Tensor | None,
    noise: Tensor | None,
    token_mask: Tensor | None,
    given: Tensor | None,
    spec: RouterSpec,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(weights, score_sums, z_sum, experts, counts): the differentiable ones first."""
    if has_no_data(logits):
        return _route_op(logits, choice_bias, noise, token_mask, given, *_fields(spec), backend)
    with runtime.plain_maths(logits):
        experts, weights, counts, score_sums, z_sum = runtime.routing_backend(backend).route_forward(
            logits, spec, choice_bias, noise, token_mask, given
        )
    return weights, score_sums, z_sum, experts, counts


def _forward_and_dispatch(
    logits: Tensor,
    choice_bias: Tensor | None,
    noise: Tensor | None,
    token_mask: Tensor | None,
    given: Tensor | None,
    spec: RouterSpec,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, TiledDispatch | None]:
    """What `_forward` returns, and the Dispatch of all choices where it comes along with them."""
    if not has_no_data(logits):
        with runtime.plain_maths(logits):
            found = runtime.routing_backend(backend).route_and_dispatch(
                logits, spec, choice_bias, noise, token_mask, given
            )
        if found is not None:
            (experts, weights, counts, score_sums, z_sum), dispatched = found
            return weights, score_sums, z_sum, experts, counts, dispatched
    return *_forward(logits, choice_bias, noise, token_mask, given, spec, backend), None


def _backward(
    grad_weights: Tensor | None,
    grad_score_sums: Tensor | None,
    grad_z_sum: Tensor | None,
    logits: Tensor,
    experts: Tensor,
    spec: RouterSpec,
    backend: str,
    *,
    all_real: bool = False,
) -> Tensor:
    """The gradient of the logits; a gradient that is None is zeros."""
    if grad_weights is None:
        grad_weights = logits.new_zeros(experts.shape, dtype=wide(logits.dtype))
    if has_no_data(logits):
        of_experts = (logits.shape[1],) if spec.sequences == 1 else (spec.sequences, logits.shape[1])
        if grad_score_sums is None:
            grad_score_sums = grad_weights.new_zeros(of_experts)
        grad_z_sum = grad_weights.new_zeros(()) if grad_z_sum is None else grad_z_sum
        return _route_backward_op(grad_weights, grad_score_sums, grad_z_sum, logits, experts, *_fields(spec), backend)
    with runtime.plain_maths(logits):
        return runtime.routing_backend(backend).route_backward(
            grad_weights, grad_score_sums, grad_z_sum, logits, experts, spec, all_real=all_real
        )


NO_GRADIENT = (None,) * 6  # of choice_bias, noise, token_mask, given, spec and backend


class _Route(torch.autograd.Function):
    """The eager path: it goes round the torch.library boundary, which costs tens of microseconds a call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Any, ...]:
        output = _forward_and_dispatch(*inputs)
        _save(ctx, inputs, output)
        ctx.set_materialize_grads(False)  # most often there is no loss of the sums
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads[:3]):
            return (None, *NO_GRADIENT)
        logits, experts = ctx.saved_tensors
        spec, name = ctx.spec, ctx.name
        grad = _backward(grads[0], grads[1], grads[2], logits, experts, spec, name, all_real=ctx.all_real)
        return (grad, *NO_GRADIENT)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    logits, _, _, token_mask, given, ctx.spec, ctx.name = inputs
    ctx.all_real = token_mask is None and given is None and not ctx.spec.weightless
    experts, counts = output[3:5]
    ctx.mark_non_differentiable(experts, counts)
    ctx.save_for_backward(logits, experts)


class _TransformedRoute(_Route):
    """The same for torch.func, which wants the context set up apart from forward: tens of microseconds a call."""

    forward = staticmethod(_forward)  # type: ignore[assignment]
    setup_context = staticmethod(_save)
    jvp = refuse_jvp("route")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return call_per_sample(_TransformedRoute.apply, info, in_dims, args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        spec, name = ctx.spec, ctx.name

        def gradient(
            grad_weights: Tensor, grad_score_sums: Tensor, grad_z_sum: Tensor, logits: Tensor, experts: Tensor
        ) -> tuple[Tensor]:
            return (_backward(grad_weights, grad_score_sums, grad_z_sum, logits, experts, spec, name),)

        (grad,) = TransformedGradient.apply(gradient, *grads[:3], *ctx.saved_tensors)
        return (grad, *NO_GRADIENT)


@torch.library.custom_op("moe_triton::route", mutates_args=())
def _route_op(
    logits: Tensor,
    choice_bias: Tensor | None,
    noise: Tensor | None,
    token_mask: Tensor | None,
    given: Tensor | None,
    top_k: int,
    score: str,
    normalize: bool,
    scale: float,
    num_groups: int,
    top_groups: int,
    group_score: str,
    weightless: int,
    sequences: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    spec = _spec(top_k, score, normalize, scale, num_groups, top_groups, group_score, weightless, sequences)
    return _forward(logits, choice_bias, noise, token_mask, given, spec, backend)


def _spec(*values: Any) -> RouterSpec:
    """What `_fields` took apart."""
    return RouterSpec(**dict(zip(FIELDS, values, strict=True)))


@_route_op.register_fake
def _(
    logits: Tensor,
    choice_bias: Tensor | None,
    noise: Tensor | None,
    token_mask: Tensor | None,
    given: Tensor | None,
    top_k: int,
    *others: Any,
) -> tuple[Tensor, ...]:
    num_tokens, num_experts = logits.shape
    dtype = wide(logits.dtype)
    sequences = others[-2]
    of_experts = (num_experts,) if sequences == 1 else (sequences, num_experts)
    return (
        logits.new_empty((num_tokens, top_k), dtype=dtype),
        logits.new_empty(of_experts, dtype=dtype),
        logits.new_empty((), dtype=dtype),
        logits.new_empty((num_tokens, top_k), dtype=torch.int32),
        logits.new_empty(of_experts, dtype=torch.int32),
    )


@torch.library.custom_op("moe_triton::route_backward", mutates_args=())
def _route_backward_op(
    grad_weights: Tensor,
    grad_score_sums: Tensor,
    grad_z_sum: Tensor,
    logits: Tensor,
    experts: Tensor,
    top_k: int,
    score: str,
    normalize: bool,
    scale: float,
    num_groups: int,
    top_groups: int,
    group_score: str,
    weightless: int,
    sequences: int,
    backend: str,
) -> Tensor:
    spec = _spec(top_k, score, normalize, scale, num_groups, top_groups, group_score, weightless, sequences)
    return _backward(grad_weights, grad_score_sums, grad_z_sum, logits, experts, spec, backend)


@_route_backward_op.register_fake
def _(grad_weights: Tensor, grad_score_sums: Tensor, grad_z_sum: Tensor, logits: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, _, _, _, *options = inputs
    experts, counts = output[3:]
    ctx.mark_non_differentiable(experts, counts)
    ctx.save_for_backward(logits, experts)
    ctx.options = options


def _op_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    logits, experts = ctx.saved_tensors
    grad = _route_backward_op(grads[0], grads[1], grads[2], logits, experts, *ctx.options)
    return (grad,) + (None,) * (4 + len(ctx.options))


_route_op.register_autograd(_op_backward, setup_context=_setup_context)
