"""The experts under autograd: one implementation behind an eager Function and a custom op for torch.compile.

An ExpertCall passes as the flat list of its tensors and the `form` of its parameters (`moe_triton.autograd.flat`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_triton import reference, runtime
from moe_triton.autograd.flat import ROWS, Form, call_of, flatten_gradients, form_of, split, tensors_of
from moe_triton.autograd.transforms import TransformedGradient, call_per_sample, once_differentiable, refuse_jvp
from moe_triton.quantization import QuantizedWeight
from moe_triton.records import ExpertCall, ExpertParameters, ExpertSpec, Wanted
from moe_triton.reference import fp8
from moe_triton.torch_internals import has_no_data, is_transforming


def run_experts(
    call: ExpertCall, *, recompute: bool = False, backend: str = "auto", is_plain: bool | None = None
) -> Tensor:
    """Compute `reference.moe_experts` of a call that has been checked: [T, d] in hidden's dtype, differentiable.

    Under autocast as PyTorch's products do. The bits do not depend on whether a gradient is wanted.
    is_plain: what `runtime.is_plain` says of the hidden states, where it was asked already.
    """
    dtype = call.hidden.dtype
    if is_plain is None:
        is_plain = runtime.is_plain(call.hidden)
    if not is_plain or runtime.is_batch_invariant():
        call = in_context(call)
    name = runtime.choose(backend, call.hidden.device, call.hidden.dtype).name
    if call.spec.batch_invariant:
        runtime.refuse_reference(name)
    if is_plain and name != "reference":
        return runtime.experts_backend(name, call.hidden.device, fp8=call.spec.fp8).experts_forward(call, False)[0]
    is_compiling = torch.compiler.is_compiling()
    with runtime.without_autocast(call.hidden.device):
        if name == "reference":
            define = fp8.moe_experts if call.spec.fp8 else reference.moe_experts
            return define(call).to(dtype)
        tensors, form = tensors_of(call), form_of(call.parameters)
        training = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        keep = training and not recompute
        if is_compiling:
            out, _ = _experts_op(tensors, form, *_fields(call.spec), name, keep)
        elif is_transforming():
            out, _ = _TransformedExperts.apply(form, call.spec, name, keep, *tensors)
        elif training:
            out, _ = _Experts.apply(form, call.spec, name, keep, *tensors)
        else:
            out = _without_gradient(call, name)
        return out.to(dtype)


def _without_gradient(call: ExpertCall, backend: str) -> Tensor:
    """The output where autograd keeps nothing: of the call itself, with all that its Dispatch brought along."""
    if has_no_data(call.hidden):
        return _experts_op(tensors_of(call), form_of(call.parameters), *_fields(call.spec), backend, False)[0]
    with runtime.plain_maths(call.hidden):
        return runtime.experts_backend(backend, call.hidden.device, fp8=call.spec.fp8).experts_forward(call, False)[0]


def in_context(call: ExpertCall) -> ExpertCall:
    """The call as the contexts around it ask: batch invariant, and in autocast's dtype with router weights in fp32."""
    if runtime.is_batch_invariant():
        call = replace(call, spec=replace(call.spec, batch_invariant=True))
    compute = runtime.autocast_dtype(call.hidden.device)
    if compute is None:
        return call
    parameters = ExpertParameters(*(_cast(x, compute) for x in call.parameters))
    return replace(call, hidden=call.hidden.to(compute), weights=call.weights.float(), parameters=parameters)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if x is None or isinstance(x, QuantizedWeight):
        return x
    if isinstance(x, Tensor):
        return x.to(dtype)
    return [tensor.to(dtype) for tensor in x]


FLAGS = tuple(field.name for field in fields(ExpertSpec) if field.type == "bool")
NUMBERS = tuple(field.name for field in fields(ExpertSpec) if field.type == "float")


def _fields(spec: ExpertSpec) -> tuple[str, float | None, float | None, list[bool], list[float]]:
    """The spec as the arguments of an op."""
    flags, numbers = ([getattr(spec, name) for name in names] for names in (FLAGS, NUMBERS))
    return spec.activation, spec.activation_limit, spec.activation_alpha, flags, numbers


def _spec(
    activation: str, limit: float | None, alpha: float | None, flags: Sequence[bool], numbers: Sequence[float]
) -> ExpertSpec:
    rest: dict[str, Any] = {**dict(zip(FLAGS, flags, strict=True)), **dict(zip(NUMBERS, numbers, strict=True))}
    return ExpertSpec(activation=activation, activation_limit=limit, activation_alpha=alpha, **rest)


def _gradients(
    grad_out: Tensor,
    preactivation: Tensor,
    tensors: Sequence[Tensor],
    form: Form,
    spec: ExpertSpec,
    backend: str,
    wanted: Wanted,
) -> list[Tensor]:
    """One gradient per differentiable tensor: hidden, weights, then the parameters; empty where not wanted."""
    if has_no_data(grad_out):
        return _experts_backward_op(grad_out, preactivation, tensors, form, *_fields(spec), backend, list(wanted))
    call = call_of(tensors, form, spec)
    with runtime.plain_maths(grad_out):
        found = runtime.experts_backend(backend, grad_out.device, fp8=spec.fp8).experts_backward(
            call, grad_out, preactivation, wanted
        )
    flat = [found.hidden, found.weights, *flatten_gradients(found[2:], form)]
    return [call.hidden.new_empty(0) if gradient is None else gradient for gradient in flat]


def _wanted(per_tensor: Sequence[bool], form: Form) -> Wanted:
    """Of what each tensor of `tensors_of` wants: a group of parameters is wanted as soon as one of it is."""
    return Wanted(*per_tensor[:2], *(any(group) for group in split(per_tensor[ROWS:], form)))


def _at_inputs(found: Sequence[Tensor], per_tensor: Sequence[bool]) -> list[Tensor | None]:
    """The wanted of `_gradients` at their places among `tensors_of`: the Dispatch has none."""
    by_tensor = [*found[:2], *[None] * (ROWS - 2), *found[2:]]
    return [gradient if want else None for gradient, want in zip(by_tensor, per_tensor, strict=True)]


class _Experts(torch.autograd.Function):
    """The eager path: it bypasses the dispatcher of torch.library, which costs tens of microseconds a call."""

    @staticmethod
    def forward(
        ctx: Any, form: Form, spec: ExpertSpec, backend: str, keep: bool, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Output [T, d], and the pre-activation [S, 2n or n] for backward: of size 0 when it is not kept."""
        hidden = tensors[0]
        if has_no_data(hidden):
            output = _experts_op(tensors, form, *_fields(spec), backend, keep)
        else:
            with runtime.plain_maths(hidden):
                experts = runtime.experts_backend(backend, hidden.device, fp8=spec.fp8)
                output = experts.experts_forward(call_of(tensors, form, spec), keep)
        if ctx is not None:
            _save(ctx, (form, spec, backend, keep, *tensors), output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, grads[0], lambda gradient, *tensors: gradient(*tensors))


_run = partial(_Experts.forward, None)  # the same where autograd keeps nothing


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.form, ctx.spec, ctx.backend, _, *tensors = inputs
    preactivation = output[1]
    ctx.mark_non_differentiable(preactivation)
    ctx.set_materialize_grads(False)  # the pre-activation's would be zeros of its size
    ctx.save_for_backward(preactivation, *tensors)


def _differentiate(ctx: Any, grad_out: Tensor | None, call: Callable[..., Any]) -> tuple[Tensor | None, ...]:
    """One gradient per input of `_run`; `call` runs a function of tensors."""
    if grad_out is None:
        return (None,) * len(ctx.needs_input_grad)
    form, spec, backend = ctx.form, ctx.spec, ctx.backend
    per_tensor = ctx.needs_input_grad[4:]
    wanted = _wanted(per_tensor, form)

    def gradient(grad_out: Tensor, preactivation: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(_gradients(grad_out, preactivation, tensors, form, spec, backend, wanted))

    found = call(gradient, grad_out, *ctx.saved_tensors)
    return (None, None, None, None, *_at_inputs(found, per_tensor))


class _TransformedExperts(_Experts):
    """The same for torch.func, which wants the context set up apart from forward: tens of microseconds a call."""

    forward = staticmethod(_run)
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
    tensors: Sequence[Tensor],
    form: Sequence[int],
    activation: str,
    limit: float | None,
    alpha: float | None,
    flags: Sequence[bool],
    numbers: Sequence[float],
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    return _run(tuple(form), _spec(activation, limit, alpha, flags, numbers), backend, keep, *tensors)


@_experts_op.register_fake
def _(
    tensors: Sequence[Tensor],
    form: Sequence[int],
    activation: str,
    limit: float | None,
    alpha: float | None,
    flags: Sequence[bool],
    numbers: Sequence[float],
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    call = call_of(tensors, tuple(form), _spec(activation, limit, alpha, flags, numbers))
    kept_shape = (call.num_rows, call.width) if keep else (0,)
    return call.hidden.new_empty(call.hidden.shape), call.hidden.new_empty(kept_shape)


@torch.library.custom_op("moe_triton::experts_backward", mutates_args=())
def _experts_backward_op(
    grad_out: Tensor,
    preactivation: Tensor,
    tensors: Sequence[Tensor],
    form: Sequence[int],
    activation: str,
    limit: float | None,
    alpha: float | None,
    flags: Sequence[bool],
    numbers: Sequence[float],
    backend: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """`_gradients`."""
    spec = _spec(activation, limit, alpha, flags, numbers)
    found = _gradients(grad_out, preactivation, tensors, tuple(form), spec, backend, Wanted(*wanted))
    # the outputs of a custom op must not share storage, as slices of one stacked gradient would
    return [gradient.clone() if gradient._base is not None else gradient for gradient in found]


@_experts_backward_op.register_fake
def _(
    grad_out: Tensor,
    preactivation: Tensor,
    tensors: Sequence[Tensor],
    form: Sequence[int],
    activation: str,
    limit: float | None,
    alpha: float | None,
    flags: Sequence[bool],
    numbers: Sequence[float],
    backend: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    groups = split([tensors[0], tensors[1], *tensors[ROWS:]], (1, 1, *form))
    return [x.new_empty(x.shape if want else (0,)) for group, want in zip(groups, wanted, strict=True) for x in group]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.form, *ctx.options, _ = inputs
    ctx.per_tensor = [x.requires_grad for x in tensors]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *tensors)


def _op_backward(ctx: Any, grad_out: Tensor, _grad_preactivation: Tensor | None) -> tuple[Any, ...]:
    preactivation, *tensors = ctx.saved_tensors
    wanted = list(_wanted(ctx.per_tensor, ctx.form))
    found = _experts_backward_op(grad_out, preactivation, tensors, ctx.form, *ctx.options, wanted)
    return (_at_inputs(found, ctx.per_tensor), *(None,) * 8)


_experts_op.register_autograd(_op_backward, setup_context=_setup_context)
