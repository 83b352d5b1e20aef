"""The experts: gather -> up -> activation -> down, times the router weight -> combine. Validation and autograd.

Definition: `moe_triton.reference.moe_mlp`. Saved for backward: the hidden states, the pre-activation, the router
weights and the dispatch; nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_triton import backends, reference
from moe_triton.checks import FLOATS, INTEGERS, check_choice, check_tensor
from moe_triton.dispatch import dispatch as make_dispatch
from moe_triton.records import ACTIVATIONS, Dispatch, ExpertSpec

Weights = Tensor | Sequence[Tensor]


def moe_mlp(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Weights,
    down_proj: Weights,
    *,
    activation: str = "swiglu",
    gate_up_bias: Weights | None = None,
    down_bias: Weights | None = None,
    is_transposed: bool = False,
    is_concatenated: bool = True,
    capacity: int | None = None,
    recompute: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The experts' part of an MoE layer for choices that are already made: sum over k of w[t, k] * expert_k(x[t]).

    Args:
        hidden_states: [T, d] fp32, fp16, bf16 or fp64.
        top_k_index: [T, K] int32 or int64; an id that is negative or >= E skips its slot.
        top_k_weights: [T, K], fp32 or the hidden states' dtype.
        gate_up_proj: [E, 2n, d] ([E, n, d] for an ungated activation), or a sequence of E such matrices, of which
            nothing is copied.
        down_proj: [E, d, n], stacked or a sequence.
        activation: gated "swiglu", "geglu" (erf), "geglu_tanh", "reglu", "gpt_oss"; ungated "silu", "gelu" (erf),
            "gelu_tanh", "relu", "relu2".
        gate_up_bias, down_bias: [E, 2n] ([E, n] ungated) and [E, d], stacked or sequences, or None.
        is_transposed: the projections are [E, d, 2n] and [E, n, d].
        is_concatenated: False when gate and up alternate (g0, u0, g1, u1, ...).
        capacity: assignments that one expert keeps, the earliest tokens first; None keeps all.
        recompute: keep only the hidden states for backward and compute the pre-activation again there.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        [T, d] in hidden_states' dtype; zeros for a token with no kept choice. Differentiable in hidden_states,
        top_k_weights and every weight and bias. Under autocast the products run in the autocast dtype.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, by name.
    """
    check_tensor("hidden_states", hidden_states, shape=("T", "d"), dtypes=FLOATS)
    num_tokens = hidden_states.shape[0]
    device = hidden_states.device
    check_tensor("top_k_index", top_k_index, shape=(num_tokens, "K"), dtypes=INTEGERS, device=device)
    num_experts = len(gate_up_proj)
    if num_experts == 0:
        raise ValueError("gate_up_proj: got no expert, wanted at least one")
    plan = make_dispatch(top_k_index, num_experts, capacity=capacity, backend=backend)
    return run_experts(
        hidden_states,
        top_k_weights,
        plan,
        gate_up_proj,
        down_proj,
        gate_up_bias,
        down_bias,
        ExpertSpec(activation=activation, is_transposed=is_transposed, is_concatenated=is_concatenated),
        recompute=recompute,
        backend=backend,
    )


def run_experts(
    hidden_states: Tensor,
    top_k_weights: Tensor,
    plan: Dispatch,
    gate_up_proj: Weights,
    down_proj: Weights,
    gate_up_bias: Weights | None,
    down_bias: Weights | None,
    spec: ExpertSpec,
    *,
    recompute: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`moe_mlp` for a Dispatch that exists already; the arguments are documented there."""
    check_choice("activation", spec.activation, ACTIVATIONS)
    num_tokens, width = check_tensor("hidden_states", hidden_states, shape=("T", "d"), dtypes=FLOATS).shape
    device, dtype = hidden_states.device, hidden_states.dtype
    _check_weights(hidden_states, plan.num_experts, spec, gate_up_proj, down_proj, gate_up_bias, down_bias)
    weights_TK = check_tensor(
        "top_k_weights",
        top_k_weights,
        shape=(num_tokens, plan.top_k),
        dtypes=(dtype, torch.float32) if dtype != torch.float64 else (dtype,),
        device=device,
    )
    if torch.is_autocast_enabled(device.type):
        compute = torch.get_autocast_dtype(device.type)
        inputs = (hidden_states, gate_up_proj, down_proj, gate_up_bias, down_bias)
        hidden_states, gate_up_proj, down_proj, gate_up_bias, down_bias = (_cast(x, compute) for x in inputs)
        with torch.autocast(device.type, enabled=False):
            if weights_TK.dtype not in (compute, torch.float32):
                weights_TK = weights_TK.float()
            name = backends.choose(backend, device, compute).name
            return _run(
                hidden_states, weights_TK, plan, gate_up_proj, down_proj, gate_up_bias, down_bias, spec, recompute, name
            ).to(dtype)
    name = backends.choose(backend, device, dtype).name
    return _run(
        hidden_states, weights_TK, plan, gate_up_proj, down_proj, gate_up_bias, down_bias, spec, recompute, name
    )


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if x is None or isinstance(x, Tensor):
        return x if x is None else x.to(dtype)
    return [tensor.to(dtype) for tensor in x]


def _check_weights(
    hidden_states: Tensor,
    num_experts: int,
    spec: ExpertSpec,
    gate_up_proj: Weights,
    down_proj: Weights,
    gate_up_bias: Weights | None,
    down_bias: Weights | None,
) -> None:
    width = hidden_states.shape[1]
    first = gate_up_proj[0] if len(gate_up_proj) else None
    if not isinstance(first, Tensor) or first.dim() != 2:
        raise ValueError("gate_up_proj: wanted [E, 2n, d], or a sequence of E matrices")
    rows = first.shape[1 if spec.is_transposed else 0]
    if spec.is_gated and rows % 2:
        raise ValueError(f"gate_up_proj: got {rows} rows of gate and up, wanted an even number for {spec.activation!r}")
    inner = rows // 2 if spec.is_gated else rows
    flip = spec.is_transposed
    check_expert_tensors("gate_up_proj", gate_up_proj, num_experts, (width, rows) if flip else (rows, width), hidden_states)
    check_expert_tensors("down_proj", down_proj, num_experts, (inner, width) if flip else (width, inner), hidden_states)
    if gate_up_bias is not None:
        check_expert_tensors("gate_up_bias", gate_up_bias, num_experts, (rows,), hidden_states)
    if down_bias is not None:
        check_expert_tensors("down_bias", down_bias, num_experts, (width,), hidden_states)


def check_expert_tensors(
    name: str, value: Weights, num_experts: int, shape: tuple[int, ...], like: Tensor
) -> None:
    """One stacked tensor [E, *shape], or E tensors of `shape`, in `like`'s dtype and on its device."""
    if isinstance(value, Tensor):
        check_tensor(name, value, shape=(num_experts, *shape), dtypes=(like.dtype,), device=like.device)
        return
    if not isinstance(value, Sequence):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a Tensor or a sequence of tensors")
    if len(value) != num_experts:
        raise ValueError(f"{name}: got {len(value)} tensors, wanted {num_experts}, one per expert")
    for e, tensor in enumerate(value):
        check_tensor(f"{name}[{e}]", tensor, shape=shape, dtypes=(like.dtype,), device=like.device)


# One implementation, over flat lists of tensors: a stacked weight is a list of one tensor of one dimension more. --------


def _flat(value: Weights | None) -> list[Tensor]:
    if value is None:
        return []
    return [value] if isinstance(value, Tensor) else list(value)


def _unflat(tensors: Sequence[Tensor], dim: int) -> Weights | None:
    if not tensors:
        return None
    return tensors[0] if tensors[0].dim() == dim + 1 else list(tensors)


def _run(
    hidden_states: Tensor,
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
    if backend == "reference":
        return reference.moe_mlp(
            hidden_states, weights, plan, gate_up_proj, down_proj, gate_up_bias, down_bias, spec
        )
    parameters = [_flat(x) for x in (gate_up_proj, down_proj, gate_up_bias, down_bias)]
    flat = [tensor for group in parameters for tensor in group]
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden_states, weights, *flat))
    options = (spec.activation, spec.is_transposed, spec.is_concatenated, backend)
    keep = training and not recompute
    index = (plan.offsets, plan.source, plan.position)
    if torch.compiler.is_compiling():
        return _experts_op(hidden_states, weights, *index, *parameters, *options, keep)[0]
    if not training:
        return _forward(hidden_states, weights, *index, *parameters, *options, False)[0]
    sizes = tuple(len(group) for group in parameters)
    return _Experts.apply(hidden_states, weights, *index, options, keep, sizes, *flat)


def _forward(
    hidden: Tensor,
    weights: Tensor,
    offsets: Tensor,
    source: Tensor,
    position: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    activation: str,
    is_transposed: bool,
    is_concatenated: bool,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    spec = ExpertSpec(activation=activation, is_transposed=is_transposed, is_concatenated=is_concatenated)
    with torch.no_grad():
        return backends.load(backend, "experts").experts_forward(
            hidden.contiguous(),
            weights.contiguous(),
            offsets,
            source,
            position,
            _unflat(gate_up, 2),
            _unflat(down, 2),
            _unflat(gate_up_bias, 1),
            _unflat(down_bias, 1),
            spec,
            keep,
        )


def _backward(
    grad_out: Tensor,
    hidden: Tensor,
    preactivation: Tensor,
    weights: Tensor,
    offsets: Tensor,
    source: Tensor,
    position: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    activation: str,
    is_transposed: bool,
    is_concatenated: bool,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients in the order (hidden, weights, *gate_up, *down, *gate_up_bias, *down_bias); an empty one where not needed."""
    spec = ExpertSpec(activation=activation, is_transposed=is_transposed, is_concatenated=is_concatenated)
    groups = (gate_up, down, gate_up_bias, down_bias)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        grads = backends.load(backend, "experts").experts_backward(
            grad_out.contiguous(),
            hidden.contiguous(),
            preactivation,
            weights.contiguous(),
            offsets,
            source,
            position,
            _unflat(gate_up, 2),
            _unflat(down, 2),
            _unflat(gate_up_bias, 1),
            _unflat(down_bias, 1),
            spec,
            tuple(needs),
        )
    out: list[Tensor] = []
    for grad, needed, like in zip(grads, needs, ([hidden], [weights], *groups), strict=True):
        out += _flat(grad) if needed else [x.new_empty(0) for x in like]
    return out


class _Experts(torch.autograd.Function):
    """The eager path: it goes round the torch.library boundary, which costs tens of microseconds a call."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weights: Tensor,
        offsets: Tensor,
        source: Tensor,
        position: Tensor,
        options: tuple[str, bool, bool, str],
        keep: bool,
        sizes: tuple[int, ...],
        *flat: Tensor,
    ) -> Tensor:
        out, preactivation = _forward(hidden, weights, offsets, source, position, *_split(flat, sizes), *options, keep)
        ctx.save_for_backward(hidden, preactivation, weights, offsets, source, position, *flat)
        ctx.options, ctx.sizes = options, sizes
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, preactivation, weights, offsets, source, position, *flat = ctx.saved_tensors
        groups = _split(flat, ctx.sizes)
        needed = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[8:])
        by_group = _split(needed[2:], ctx.sizes)
        needs = (*needed[:2], *(any(group) for group in by_group))
        out = _backward(
            grads[0], hidden, preactivation, weights, offsets, source, position, *groups, *ctx.options, needs
        )
        wanted = [grad if need else None for grad, need in zip(out, needed, strict=True)]
        return (*wanted[:2], None, None, None, None, None, None, *wanted[2:])


def _split(flat: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    groups, start = [], 0
    for size in sizes:
        groups.append(list(flat[start : start + size]))
        start += size
    return groups


# The compiled path: the same functions, opaque to torch.compile. ------------------------------------------------------


@torch.library.custom_op("moe_triton::experts", mutates_args=())
def _experts_op(
    hidden: Tensor,
    weights: Tensor,
    offsets: Tensor,
    source: Tensor,
    position: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    activation: str,
    is_transposed: bool,
    is_concatenated: bool,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    return _forward(
        hidden,
        weights,
        offsets,
        source,
        position,
        gate_up,
        down,
        gate_up_bias,
        down_bias,
        activation,
        is_transposed,
        is_concatenated,
        backend,
        keep,
    )


@_experts_op.register_fake
def _(
    hidden: Tensor,
    weights: Tensor,
    offsets: Tensor,
    source: Tensor,
    position: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    activation: str,
    is_transposed: bool,
    is_concatenated: bool,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    columns = gate_up[0].shape[-1 if is_transposed else -2]
    preactivation = hidden.new_empty((source.shape[0], columns) if keep else (0,))
    return torch.empty_like(hidden, memory_format=torch.contiguous_format), preactivation


@torch.library.custom_op("moe_triton::experts_backward", mutates_args=())
def _experts_backward_op(
    grad_out: Tensor,
    hidden: Tensor,
    preactivation: Tensor,
    weights: Tensor,
    offsets: Tensor,
    source: Tensor,
    position: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    activation: str,
    is_transposed: bool,
    is_concatenated: bool,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    grads = _backward(
        grad_out,
        hidden,
        preactivation,
        weights,
        offsets,
        source,
        position,
        gate_up,
        down,
        gate_up_bias,
        down_bias,
        activation,
        is_transposed,
        is_concatenated,
        backend,
        needs,
    )
    # the outputs of a custom op must not share storage; slices of one stacked gradient would
    return [x.clone() if x._base is not None else x for x in grads]


@_experts_backward_op.register_fake
def _(
    grad_out: Tensor,
    hidden: Tensor,
    preactivation: Tensor,
    weights: Tensor,
    offsets: Tensor,
    source: Tensor,
    position: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    activation: str,
    is_transposed: bool,
    is_concatenated: bool,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    out = []
    for group, needed in zip(([hidden], [weights], gate_up, down, gate_up_bias, down_bias), needs, strict=True):
        out += [x.new_empty(x.shape) if needed else x.new_empty(0) for x in group]
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weights, offsets, source, position, *groups = inputs[:9]
    _, preactivation = output
    ctx.mark_non_differentiable(preactivation)
    flat = [tensor for group in groups for tensor in group]
    ctx.save_for_backward(hidden, preactivation, weights, offsets, source, position, *flat)
    ctx.sizes = tuple(len(group) for group in groups)
    ctx.options = inputs[9:13]
    ctx.needs = tuple(any(x.requires_grad for x in group) for group in ([hidden], [weights], *groups))


def _op_backward(ctx: Any, grad_out: Tensor, _grad_preactivation: Tensor | None) -> tuple[Any, ...]:
    hidden, preactivation, weights, offsets, source, position, *flat = ctx.saved_tensors
    groups = _split(flat, ctx.sizes)
    grads = _experts_backward_op(
        grad_out, hidden, preactivation, weights, offsets, source, position, *groups, *ctx.options, ctx.needs
    )
    by_group = _split(grads, (1, 1, *ctx.sizes))
    wanted = [group if needed else [None] * len(group) for group, needed in zip(by_group, ctx.needs, strict=True)]
    return (wanted[0][0], wanted[1][0], None, None, None, *wanted[2:], None, None, None, None, None)


_experts_op.register_autograd(_op_backward, setup_context=_setup_context)
