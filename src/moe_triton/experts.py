"""The experts: gather -> up -> activation -> down, times the router weight -> combine.

Definition: `moe_triton.reference.moe_experts`. Saved for backward: the hidden states, the pre-activation, the router
weights and the dispatch; nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from moe_triton import runtime
from moe_triton.autograd.experts import run_experts
from moe_triton.checks import FLOATS, INTEGERS, check_choice, check_number, check_tensor
from moe_triton.dispatch import dispatch
from moe_triton.kinds import MOST_KINDS
from moe_triton.quantization import QuantizedWeight
from moe_triton.records import (
    ACTIVATIONS,
    LIMITED,
    Dispatch,
    ExpertCall,
    ExpertParameters,
    ExpertSpec,
    ExpertWeight,
    Lora,
    Projection,
    matrix_shape,
)
from moe_triton.torch_internals import is_autocast_anywhere

Adapters = Lora | Sequence[Lora] | None  # of one projection; several are summed


def moe_mlp(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Projection,
    down_proj: Projection,
    *,
    activation: str = "swiglu",
    activation_limit: float | None = None,
    activation_alpha: float | None = None,
    gate_up_bias: ExpertWeight | None = None,
    down_bias: ExpertWeight | None = None,
    gate_up_lora: Adapters = None,
    down_lora: Adapters = None,
    is_transposed: bool = False,
    is_concatenated: bool = True,
    capacity: int | None = None,
    fp8: bool | str = False,
    recompute: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Compute the experts' part of an MoE layer for choices that are made: sum over k of w[t, k] * expert_k(x[t]).

    `moe_triton.dispatch` and `moe_experts` in one call.

    Args:
        hidden_states: [T, d] fp32, fp16, bf16 or fp64.
        top_k_index: [T, K] int32 or int64; an id that is negative or >= E skips its slot.
        top_k_weights: [T, K], fp32 or the hidden states' dtype.
        gate_up_proj: [E, 2n, d] ([E, n, d] for an ungated activation), or a sequence of E such matrices, of which
            nothing is copied; or a `QuantizedWeight`, which is frozen.
        down_proj: [E, d, n], stacked, a sequence, or a `QuantizedWeight`.
        activation: gated "swiglu", "geglu" (erf), "geglu_tanh", "reglu", "gpt_oss"; ungated "silu", "gelu" (erf),
            "gelu_tanh", "relu", "relu2".
        activation_limit: L, of "swiglu" and "gpt_oss": gate is cut to at most L and up to [-L, L] before they are
            used; gradients pass up to and at L. None: not cut for "swiglu" (DeepSeek-V4: 10), 7 for "gpt_oss".
        activation_alpha: of the same two, the slope in gate * sigmoid(alpha * gate). None: 1, and 1.702 for "gpt_oss".
        gate_up_bias, down_bias: [E, 2n] ([E, n] ungated) and [E, d], stacked or sequences, or None.
        gate_up_lora, down_lora: `Lora` adapters of the projections, or sequences of several that are summed, or None.
            Of any dtype: they are cast to the one that the products compute with. No delta of a projection's size is
            made, and a projection that wants no gradient costs none.
        is_transposed: the projections are [E, d, 2n] and [E, n, d].
        is_concatenated: False when gate and up alternate (g0, u0, g1, u1, ...).
        capacity: assignments that one expert keeps, the earliest tokens first; None keeps all.
        fp8: round both operands of every product with a projection, in forward and backward, to e4m3 with one scale for
            128 numbers (128 x 128 of a projection), as DeepSeek-V3 trains (arXiv 2412.19437; `moe_triton.reference.fp8`
            is the definition). Parameters, what is kept for backward and gradients stay in their dtype. Not for float64
            and quantised projections. "mxfp8": one power of two for 32 numbers instead (OCP Microscaling Formats v1.0).
        recompute: keep only the hidden states for backward and compute the pre-activation again there.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        [T, d] in hidden_states' dtype; zeros for a token with no kept choice. Differentiable in hidden_states,
        top_k_weights and every weight, bias and adapter. Under autocast the products run in the autocast dtype.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, by name.
    """
    check_tensor("hidden_states", hidden_states, shape=("T", "d"), dtypes=FLOATS)
    num_tokens, device = hidden_states.shape[0], hidden_states.device
    check_tensor("top_k_index", top_k_index, shape=(num_tokens, "K"), dtypes=INTEGERS, device=device)
    num_experts = count_experts("gate_up_proj", gate_up_proj)
    if num_experts == 0:
        raise ValueError("gate_up_proj: got no expert, wanted at least one")
    parameters = ExpertParameters(gate_up_proj, down_proj, gate_up_bias, down_bias)
    spec = ExpertSpec(
        activation=activation,
        activation_limit=activation_limit,
        activation_alpha=activation_alpha,
        is_transposed=is_transposed,
        is_concatenated=is_concatenated,
        **fp8_flags(fp8),
    )
    check_activation(activation, activation_limit, activation_alpha)
    dtypes = _dtypes(hidden_states)
    _check_weights("top_k_weights", top_k_weights, hidden_states, top_k_index.shape[1], dtypes)
    _check_parameters(parameters, num_experts, spec, hidden_states, dtypes)
    check_adapters(parameters, spec, hidden_states.device, gate_up_lora=gate_up_lora, down_lora=down_lora)
    dispatched = dispatch(top_k_index, num_experts, capacity=capacity, backend=backend)
    call = ExpertCall(
        hidden=hidden_states, weights=top_k_weights, dispatched=dispatched, parameters=parameters, spec=spec
    )
    return run_experts(with_adapters(call, gate_up_lora, down_lora), recompute=recompute, backend=backend)


def moe_experts(
    hidden_states: Tensor,
    weights: Tensor,
    dispatched: Dispatch,
    gate_up_proj: Projection,
    down_proj: Projection,
    *,
    activation: str = "swiglu",
    activation_limit: float | None = None,
    activation_alpha: float | None = None,
    gate_up_bias: ExpertWeight | None = None,
    down_bias: ExpertWeight | None = None,
    gate_up_lora: Adapters = None,
    down_lora: Adapters = None,
    is_transposed: bool = False,
    is_concatenated: bool = True,
    fp8: bool | str = False,
    recompute: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Compute the experts for a Dispatch that exists: out[t] = sum over t's kept choices k of w[t, k] * expert_k(x[t]).

    Args:
        hidden_states: [T, d] fp32, fp16, bf16 or fp64.
        weights: [T, K], the router weights, fp32 or the hidden states' dtype.
        dispatched: from `moe_triton.dispatch`, of T tokens with K choices among E experts.

    The other arguments, what is returned and what is raised are those of `moe_mlp`.
    """
    parameters = ExpertParameters(gate_up_proj, down_proj, gate_up_bias, down_bias)
    spec = ExpertSpec(
        activation=activation,
        activation_limit=activation_limit,
        activation_alpha=activation_alpha,
        is_transposed=is_transposed,
        is_concatenated=is_concatenated,
        **fp8_flags(fp8),
    )
    if not isinstance(dispatched, Dispatch):
        raise TypeError(f"dispatched: got {type(dispatched).__name__}, wanted a Dispatch from moe_triton.dispatch")
    check_activation(activation, activation_limit, activation_alpha)
    call = ExpertCall(hidden=hidden_states, weights=weights, dispatched=dispatched, parameters=parameters, spec=spec)
    check_call(call, "weights")
    check_adapters(parameters, spec, hidden_states.device, gate_up_lora=gate_up_lora, down_lora=down_lora)
    return run_experts(with_adapters(call, gate_up_lora, down_lora), recompute=recompute, backend=backend)


def check_call(call: ExpertCall, weights_name: str = "top_k_weights", is_plain: bool = False) -> None:
    """Raise ValueError or TypeError for whatever can be wrong with a call of a valid spec, before the first launch.

    Not for a call whose tensors are like those of one that passed.
    is_plain: what `runtime.is_plain` says of the hidden states, where it was asked already.
    """
    kind = call.kind if is_plain or not torch.compiler.is_compiling() else None
    if kind is not None and kind in _PASSED:  # torch.compile would guard the set
        return
    num_tokens, top_k = call.dispatched.position.shape
    device = call.dispatched.position.device
    check_tensor("hidden_states", call.hidden, shape=(num_tokens, "d"), dtypes=FLOATS, device=device)
    dtypes = _dtypes(call.hidden)
    _check_weights(weights_name, call.weights, call.hidden, top_k, dtypes)
    _check_parameters(call.parameters, call.num_experts, call.spec, call.hidden, dtypes)
    if kind is not None and not is_autocast_anywhere():  # which lets more pass
        if len(_PASSED) >= MOST_KINDS:
            _PASSED.clear()
        _PASSED.add(kind)


_PASSED: set[object] = set()  # kinds of calls


def _dtypes(hidden_states: Tensor) -> tuple[torch.dtype, ...]:
    """What may go with these hidden states: under autocast everything, since it is cast."""
    return (hidden_states.dtype,) if runtime.autocast_dtype(hidden_states.device) is None else FLOATS


def _check_weights(
    name: str, weights: Tensor, hidden_states: Tensor, top_k: int, dtypes: tuple[torch.dtype, ...]
) -> None:
    dtypes = dtypes if hidden_states.dtype in (torch.float32, torch.float64) else (*dtypes, torch.float32)
    shape = (hidden_states.shape[0], top_k)
    check_tensor(name, weights, shape=shape, dtypes=dtypes, device=hidden_states.device)


def _check_parameters(
    parameters: ExpertParameters,
    num_experts: int,
    spec: ExpertSpec,
    hidden_states: Tensor,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    width, device = hidden_states.shape[1], hidden_states.device
    gate_up_proj, down_proj, gate_up_bias, down_bias = parameters[:4]
    check_fp8(parameters, spec, hidden_states)
    rows = _matrix_shape("gate_up_proj", gate_up_proj)[1 if spec.is_transposed else 0]
    if spec.is_gated and rows % 2:
        raise ValueError(f"gate_up_proj: got {rows} rows of gate and up, wanted an even number for {spec.activation!r}")
    inner = rows // 2 if spec.is_gated else rows
    up_shape, down_shape = (rows, width), (width, inner)
    if spec.is_transposed:
        up_shape, down_shape = up_shape[::-1], down_shape[::-1]
    check_expert_tensors("gate_up_proj", gate_up_proj, num_experts, up_shape, dtypes, device)
    check_expert_tensors("down_proj", down_proj, num_experts, down_shape, dtypes, device)
    if gate_up_bias is not None:
        check_expert_tensors("gate_up_bias", gate_up_bias, num_experts, (rows,), dtypes, device)
    if down_bias is not None:
        check_expert_tensors("down_bias", down_bias, num_experts, (width,), dtypes, device)


def fp8_flags(fp8: bool | str) -> dict[str, Any]:
    """Return the fields of an ExpertSpec that `fp8=` stands for. Raises ValueError for what it cannot be."""
    if not isinstance(fp8, bool) and fp8 != "mxfp8":
        raise ValueError(f"fp8: got {fp8!r}, wanted False, True or 'mxfp8'")
    return {"fp8": bool(fp8), "microscaled": fp8 == "mxfp8"}


def check_fp8(parameters: ExpertParameters, spec: ExpertSpec, hidden_states: Tensor) -> None:
    """Raise TypeError where products are to be in fp8 and cannot."""
    if not spec.fp8:
        return
    if (runtime.autocast_dtype(hidden_states.device) or hidden_states.dtype) == torch.float64:
        raise TypeError("hidden_states: got dtype torch.float64 with fp8=True, wanted float32, float16 or bfloat16")
    for name, projection in zip(("gate_up_proj", "down_proj"), parameters[:2], strict=True):
        if isinstance(projection, QuantizedWeight):
            raise TypeError(f"{name}: got a QuantizedWeight with fp8=True, wanted a projection in a float dtype")


def check_activation(activation: str, limit: float | None, alpha: float | None) -> None:
    """Raise for an unknown activation, and for a limit or an alpha that it does not take."""
    check_choice("activation", activation, ACTIVATIONS)
    for name, value in (("activation_limit", limit), ("activation_alpha", alpha)):
        if value is not None and activation not in LIMITED:
            raise ValueError(f"{name}: got {value} for {activation!r}, wanted None; only {', '.join(LIMITED)} have one")
        if value is not None:
            check_number(name, value, above=0)


def _matrix_shape(name: str, projection: Projection) -> tuple[int, int]:
    if isinstance(projection, Tensor) and projection.dim() == 3:
        return projection.shape[1], projection.shape[2]
    if count_experts(name, projection) > 0:
        first = projection if isinstance(projection, QuantizedWeight) else projection[0]
        if isinstance(first, QuantizedWeight) or (isinstance(first, Tensor) and first.dim() == 2):
            return matrix_shape(projection)
    raise ValueError(f"{name}: wanted [E, 2n, d], or a sequence of E matrices")


def with_adapters(call: ExpertCall, gate_up: Adapters, down: Adapters) -> ExpertCall:
    """Add adapters to a call, in the dtype that its products compute with.

    Several of one projection become one, of the sum of their ranks; each has its own gradients.
    """
    if not gate_up and not down:
        return call
    dtype = runtime.autocast_dtype(call.hidden.device) or call.hidden.dtype
    parameters, spec = call.parameters, call.spec
    if (one := _joined(gate_up, dtype)) is not None:
        parameters = parameters._replace(gate_up_lora_a=one.a, gate_up_lora_b=one.b)
        spec = replace(spec, gate_up_scaling=one.scaling)
    if (one := _joined(down, dtype)) is not None:
        parameters = parameters._replace(down_lora_a=one.a, down_lora_b=one.b)
        spec = replace(spec, down_scaling=one.scaling)
    return replace(call, parameters=parameters, spec=spec)


def _joined(adapters: Adapters, dtype: torch.dtype) -> Lora | None:
    """The sum of the adapters as one."""
    several = _as_list(adapters)
    if len(several) == 1:  # nothing is copied: what is copied would be saved for backward
        (only,) = several
        return Lora(only.a.to(dtype), only.b.to(dtype), only.scaling)
    if not several:
        return None
    a = torch.cat([lora.a.to(dtype) for lora in several], dim=1)
    return Lora(a, torch.cat([(lora.scaling * lora.b).to(dtype) for lora in several], dim=2))


def _as_list(adapters: Adapters) -> Sequence[Lora]:
    return () if adapters is None else (adapters,) if isinstance(adapters, Lora) else adapters


def check_adapters(
    parameters: ExpertParameters, spec: ExpertSpec, device: torch.device, **adapters_of: Adapters
) -> None:
    """Raise for adapters, by the names `gate_up_lora` and `down_lora`, that do not fit checked parameters."""
    for name, adapters in adapters_of.items():
        if not isinstance(adapters, (Lora, Sequence, NoneType)):
            raise TypeError(f"{name}: got {type(adapters).__name__}, wanted a Lora or a sequence of them")
        projection = parameters.gate_up if name == "gate_up_lora" else parameters.down
        size_out, size_in = matrix_shape(projection)[:: -1 if spec.is_transposed else 1]
        for index, lora in enumerate(_as_list(adapters)):
            label = name if isinstance(adapters, Lora) else f"{name}[{index}]"
            if not isinstance(lora, Lora):
                raise TypeError(f"{label}: got {type(lora).__name__}, wanted a Lora")
            check_tensor(f"{label}.a", lora.a, shape=(len(projection), "r", size_in), dtypes=FLOATS, device=device)
            rank = lora.a.shape[1]
            if rank == 0:
                raise ValueError(f"{label}.a: got rank 0, wanted at least 1")
            check_tensor(f"{label}.b", lora.b, shape=(len(projection), size_out, rank), dtypes=FLOATS, device=device)
            check_number(f"{label}.scaling", lora.scaling)


def count_experts(name: str, value: object) -> int:
    """Return the number of experts in a stacked tensor, or in a sequence of one tensor per expert."""
    if not isinstance(value, (Tensor, Sequence, nn.ParameterList, QuantizedWeight)):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a Tensor or a sequence of tensors")
    if isinstance(value, Tensor) and value.dim() == 0:
        raise ValueError(f"{name}: got a scalar, wanted [E, ...]")
    return len(value)


def check_expert_tensors(
    name: str,
    value: Projection,
    num_experts: int,
    shape: tuple[int, ...],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """One stacked tensor [E, *shape], a sequence of E tensors of `shape`, or a quantised weight of that shape."""
    if isinstance(value, Tensor):
        check_tensor(name, value, shape=(num_experts, *shape), dtypes=dtypes, device=device)
        return
    if isinstance(value, QuantizedWeight):
        if value.shape != (num_experts, *shape):
            raise ValueError(f"{name}: got shape {list(value.shape)}, wanted {[num_experts, *shape]}")
        if value.device != device:
            raise ValueError(f"{name}: got device {value.device}, wanted {device}")
        return
    count = count_experts(name, value)
    if count != num_experts:
        raise ValueError(f"{name}: got {count} tensors, wanted {num_experts}, one per expert")
    for e, tensor in enumerate(value):
        check_tensor(f"{name}[{e}]", tensor, shape=shape, dtypes=dtypes, device=device)
