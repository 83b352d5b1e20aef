"""The experts under autograd: one implementation behind an eager Function and a custom op for torch.compile.

Weights pass as flat lists: a stacked weight is a list of one tensor, which has one dimension more than an expert's own.
`index` is [offsets, source, position] of a Dispatch; `layout` is [is_transposed, is_concatenated].
Groups of differentiable inputs, in this order everywhere: hidden, weights, gate_up, down, gate_up_bias, down_bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_triton import runtime
from moe_triton.autograd.transforms import (
    TransformedGradient,
    call_per_sample,
    has_no_data,
    is_transforming,
    refuse_jvp,
)
from moe_triton.records import Dispatch, ExpertSpec

Weights = Tensor | Sequence[Tensor]


def run_experts_under_autograd(
    hidden: Tensor,
    weights: Tensor,
    plan: Dispatch,
    gate_up_proj: Weights,
    down_proj: Weights,
    gate_up_bias: Weights | None,
    down_bias: Weights | None,
    spec: ExpertSpec,
    recompute: bool,
    backend: str,
) -> Tensor:
    """`reference.moe_mlp` by a backend: [T, d], the same bits whether or not a gradient is wanted."""
    groups = [_flat(x) for x in (gate_up_proj, down_proj, gate_up_bias, down_bias)]
    flat = [tensor for group in groups for tensor in group]
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, weights, *flat))
    keep = training and not recompute
    index = [plan.offsets, plan.source, plan.position]
    layout = [spec.is_transposed, spec.is_concatenated]
    if torch.compiler.is_compiling():
        return _experts_op(hidden, weights, index, *groups, spec.activation, layout, backend, keep)[0]
    transforming = is_transforming()
    if not training and not transforming:
        return _forward(hidden, weights, index, groups, spec, backend, False)[0]
    sizes = tuple(len(group) for group in groups)
    function = _TransformedExperts if transforming else _Experts
    return function.apply(hidden, weights, *index, spec, backend, keep, sizes, *flat)[0]


def _flat(value: Weights | None) -> list[Tensor]:
    if value is None:
        return []
    return [value] if isinstance(value, Tensor) else list(value)


def _unflat(tensors: Sequence[Tensor], dim: int) -> Weights | None:
    if not tensors:
        return None
    return tensors[0] if tensors[0].dim() == dim + 1 else tensors


def _split(flat: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    groups, start = [], 0
    for size in sizes:
        groups.append(list(flat[start : start + size]))
        start += size
    return groups


def _parameters(groups: Sequence[Sequence[Tensor]]) -> tuple[Weights | None, ...]:
    return tuple(_unflat(group, dim) for group, dim in zip(groups, (2, 2, 1, 1), strict=True))


def _forward(
    hidden: Tensor,
    weights: Tensor,
    index: Sequence[Tensor],
    groups: Sequence[Sequence[Tensor]],
    spec: ExpertSpec,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Output [T, d], and the pre-activation [S, 2n or n] for backward: of size 0 when it is not kept."""
    if has_no_data(hidden):
        layout = [spec.is_transposed, spec.is_concatenated]
        return _experts_op(hidden, weights, index, *groups, spec.activation, layout, backend, keep)
    with runtime.plain_maths(hidden):
        return runtime.load(backend, "experts").experts_forward(
            hidden.contiguous(), weights.contiguous(), *index, *_parameters(groups), spec, keep
        )


def _backward(
    grad_out: Tensor,
    hidden: Tensor,
    preactivation: Tensor,
    weights: Tensor,
    index: Sequence[Tensor],
    groups: Sequence[Sequence[Tensor]],
    spec: ExpertSpec,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """One gradient per differentiable input, in order; an empty tensor for every input of a group not needed."""
    if has_no_data(hidden):
        options = (spec.activation, [spec.is_transposed, spec.is_concatenated], backend, needs)
        return _experts_backward_op(grad_out, hidden, preactivation, weights, index, *groups, *options)
    with runtime.plain_maths(hidden):
        grads = runtime.load(backend, "experts").experts_backward(
            grad_out.contiguous(),
            hidden.contiguous(),
            preactivation,
            weights.contiguous(),
            *index,
            *_parameters(groups),
            spec,
            tuple(needs),
        )
    out: list[Tensor] = []
    for grad, needed, inputs in zip(grads, needs, ([hidden], [weights], *groups), strict=True):
        out += _flat(grad) if needed else [x.new_empty(0) for x in inputs]
    return out


class _Experts(torch.autograd.Function):
    """The eager path: it goes round the torch.library boundary, which costs tens of microseconds a call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _run(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, grads[0], lambda gradient, *tensors: gradient(*tensors))


def _run(
    hidden: Tensor,
    weights: Tensor,
    offsets: Tensor,
    source: Tensor,
    position: Tensor,
    spec: ExpertSpec,
    backend: str,
    keep: bool,
    sizes: tuple[int, ...],
    *flat: Tensor,
) -> tuple[Tensor, Tensor]:
    return _forward(hidden, weights, (offsets, source, position), _split(flat, sizes), spec, backend, keep)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weights, offsets, source, position, ctx.spec, ctx.backend, _, ctx.sizes, *flat = inputs
    preactivation = output[1]
    ctx.mark_non_differentiable(preactivation)
    ctx.set_materialize_grads(False)  # the pre-activation's would be zeros of its size
    ctx.save_for_backward(hidden, preactivation, weights, offsets, source, position, *flat)


def _differentiate(ctx: Any, grad_out: Tensor | None, call: Callable[..., Any]) -> tuple[Tensor | None, ...]:
    """One gradient per input of `_run`; `call` runs a function of tensors."""
    if grad_out is None:
        return (None,) * len(ctx.needs_input_grad)
    sizes, spec, backend = ctx.sizes, ctx.spec, ctx.backend
    wanted = ctx.needs_input_grad[:2] + ctx.needs_input_grad[9:]
    needs = [any(group) for group in _split(wanted, (1, 1, *sizes))]

    def gradient(grad_out: Tensor, hidden: Tensor, preactivation: Tensor, weights: Tensor, *rest: Tensor) -> Any:
        index, groups = rest[:3], _split(rest[3:], sizes)
        return tuple(_backward(grad_out, hidden, preactivation, weights, index, groups, spec, backend, needs))

    out = call(gradient, grad_out, *ctx.saved_tensors)
    found = [grad if want else None for grad, want in zip(out, wanted, strict=True)]
    return (*found[:2], *(None,) * 7, *found[2:])


class _TransformedExperts(_Experts):
    """The same for torch.func, which wants the context set up apart from forward: tens of microseconds a call."""

    forward = staticmethod(_run)  # type: ignore[assignment]
    setup_context = staticmethod(_save)
    jvp = refuse_jvp("moe_mlp")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return call_per_sample(_TransformedExperts.apply, info, in_dims, args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, grads[0], TransformedGradient.apply)


@torch.library.custom_op("moe_triton::experts", mutates_args=())
def _experts_op(
    hidden: Tensor,
    weights: Tensor,
    index: Sequence[Tensor],
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    activation: str,
    layout: Sequence[bool],
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    groups = (gate_up, down, gate_up_bias, down_bias)
    return _forward(hidden, weights, index, groups, _spec(activation, layout), backend, keep)


def _spec(activation: str, layout: Sequence[bool]) -> ExpertSpec:
    return ExpertSpec(activation=activation, is_transposed=layout[0], is_concatenated=layout[1])


@_experts_op.register_fake
def _(
    hidden: Tensor,
    weights: Tensor,
    index: Sequence[Tensor],
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    activation: str,
    layout: Sequence[bool],
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    columns = gate_up[0].shape[-1 if layout[0] else -2]
    num_rows = index[1].shape[0]
    return hidden.new_empty(hidden.shape), hidden.new_empty((num_rows, columns) if keep else (0,))


@torch.library.custom_op("moe_triton::experts_backward", mutates_args=())
def _experts_backward_op(
    grad_out: Tensor,
    hidden: Tensor,
    preactivation: Tensor,
    weights: Tensor,
    index: Sequence[Tensor],
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    activation: str,
    layout: Sequence[bool],
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    groups = (gate_up, down, gate_up_bias, down_bias)
    spec = _spec(activation, layout)
    grads = _backward(grad_out, hidden, preactivation, weights, index, groups, spec, backend, needs)
    # the outputs of a custom op must not share storage, as slices of one stacked gradient would
    return [grad.clone() if grad._base is not None else grad for grad in grads]


@_experts_backward_op.register_fake
def _(
    grad_out: Tensor,
    hidden: Tensor,
    preactivation: Tensor,
    weights: Tensor,
    index: Sequence[Tensor],
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    activation: str,
    layout: Sequence[bool],
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    out = []
    for group, needed in zip(([hidden], [weights], gate_up, down, gate_up_bias, down_bias), needs, strict=True):
        out += [x.new_empty(x.shape if needed else (0,)) for x in group]
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weights, index, *groups = inputs[:7]
    _, preactivation = output
    ctx.mark_non_differentiable(preactivation)
    ctx.save_for_backward(hidden, preactivation, weights, *index, *(x for group in groups for x in group))
    ctx.sizes = [len(group) for group in groups]
    ctx.options = inputs[7:10]
    ctx.needs = [any(x.requires_grad for x in group) for group in ([hidden], [weights], *groups)]


def _op_backward(ctx: Any, grad_out: Tensor, _grad_preactivation: Tensor | None) -> tuple[Any, ...]:
    hidden, preactivation, weights, *rest = ctx.saved_tensors
    index, groups = rest[:3], _split(rest[3:], ctx.sizes)
    grads = _experts_backward_op(grad_out, hidden, preactivation, weights, index, *groups, *ctx.options, ctx.needs)
    found = [
        group if needed else [None] * len(group)
        for group, needed in zip(_split(grads, (1, 1, *ctx.sizes)), ctx.needs, strict=True)
    ]
    return (*found[0], *found[1], [None] * 3, *found[2:], None, None, None, None)


_experts_op.register_autograd(_op_backward, setup_context=_setup_context)
