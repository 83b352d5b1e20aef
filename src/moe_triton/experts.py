"""The experts: gather -> up -> activation -> down, times the router weight -> combine.

Definition: `moe_triton.reference.moe_mlp`. Saved for backward: the hidden states, the pre-activation, the router
weights and the dispatch; nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_triton import reference, runtime
from moe_triton.autograd.experts import Weights, run_experts_under_autograd
from moe_triton.checks import FLOATS, INTEGERS, check_choice, check_tensor
from moe_triton.dispatch import dispatch as make_dispatch
from moe_triton.records import ACTIVATIONS, Dispatch, ExpertSpec

Parameters = tuple[Weights, Weights, Weights | None, Weights | None]  # gate_up, down and their biases


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
    num_experts = count_experts("gate_up_proj", gate_up_proj)
    if num_experts == 0:
        raise ValueError("gate_up_proj: got no expert, wanted at least one")
    parameters = (gate_up_proj, down_proj, gate_up_bias, down_bias)
    spec = ExpertSpec(activation=activation, is_transposed=is_transposed, is_concatenated=is_concatenated)
    _check(hidden_states, top_k_weights, top_k_index.shape[1], num_experts, parameters, spec, backend)
    plan = make_dispatch(top_k_index, num_experts, capacity=capacity, backend=backend)
    return _compute(hidden_states, top_k_weights, plan, parameters, spec, recompute, backend)


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
    parameters = (gate_up_proj, down_proj, gate_up_bias, down_bias)
    _check(hidden_states, top_k_weights, plan.top_k, plan.num_experts, parameters, spec, backend)
    return _compute(hidden_states, top_k_weights, plan, parameters, spec, recompute, backend)


def _compute(
    hidden_states: Tensor,
    top_k_weights: Tensor,
    plan: Dispatch,
    parameters: Parameters,
    spec: ExpertSpec,
    recompute: bool,
    backend: str,
) -> Tensor:
    device, dtype = hidden_states.device, hidden_states.dtype
    hidden_states, top_k_weights, parameters = in_autocast_dtype(hidden_states, top_k_weights, parameters)
    name = runtime.choose(backend, device, hidden_states.dtype).name
    with runtime.without_autocast(device):
        if name == "reference":
            out = reference.moe_mlp(hidden_states, top_k_weights, plan, *parameters, spec)
        else:
            out = run_experts_under_autograd(hidden_states, top_k_weights, plan, *parameters, spec, recompute, name)
    return out.to(dtype)


def in_autocast_dtype(
    hidden_states: Tensor, top_k_weights: Tensor, parameters: Parameters
) -> tuple[Tensor, Tensor, Parameters]:
    """What the products compute with: under autocast its dtype, and the router weights in fp32."""
    compute = runtime.autocast_dtype(hidden_states.device)
    if compute is None:
        return hidden_states, top_k_weights, parameters
    gate_up, down, gate_up_bias, down_bias = (_cast(x, compute) for x in parameters)
    return hidden_states.to(compute), top_k_weights.float(), (gate_up, down, gate_up_bias, down_bias)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if x is None or isinstance(x, Tensor):
        return x if x is None else x.to(dtype)
    return [tensor.to(dtype) for tensor in x]


def _check(
    hidden_states: Tensor,
    top_k_weights: Tensor,
    top_k: int,
    num_experts: int,
    parameters: Parameters,
    spec: ExpertSpec,
    backend: str,
) -> None:
    """Everything that can be wrong with the experts' inputs, before the first launch."""
    check_choice("activation", spec.activation, ACTIVATIONS)
    num_tokens, width = check_tensor("hidden_states", hidden_states, shape=("T", "d"), dtypes=FLOATS).shape
    dtype, device = hidden_states.dtype, hidden_states.device
    compute = runtime.autocast_dtype(device)
    runtime.choose(backend, device, compute or dtype)
    dtypes = FLOATS if compute is not None else (dtype,)
    weight_dtypes = dtypes if dtype in (torch.float32, torch.float64) else (*dtypes, torch.float32)
    check_tensor("top_k_weights", top_k_weights, shape=(num_tokens, top_k), dtypes=weight_dtypes, device=device)

    gate_up_proj, down_proj, gate_up_bias, down_bias = parameters
    first = gate_up_proj[0] if count_experts("gate_up_proj", gate_up_proj) else None
    if not isinstance(first, Tensor) or first.dim() != 2:
        raise ValueError("gate_up_proj: wanted [E, 2n, d], or a sequence of E matrices")
    rows = first.shape[1 if spec.is_transposed else 0]
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


def count_experts(name: str, value: object) -> int:
    """Return the number of experts in a stacked tensor, or in a sequence of one tensor per expert."""
    if not isinstance(value, (Tensor, Sequence, nn.ParameterList)):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a Tensor or a sequence of tensors")
    if isinstance(value, Tensor) and value.dim() == 0:
        raise ValueError(f"{name}: got a scalar, wanted [E, ...]")
    return len(value)


def check_expert_tensors(
    name: str,
    value: Weights,
    num_experts: int,
    shape: tuple[int, ...],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """One stacked tensor [E, *shape], or a sequence of E tensors of `shape`."""
    if isinstance(value, Tensor):
        check_tensor(name, value, shape=(num_experts, *shape), dtypes=dtypes, device=device)
        return
    count = count_experts(name, value)
    if count != num_experts:
        raise ValueError(f"{name}: got {count} tensors, wanted {num_experts}, one per expert")
    for e, tensor in enumerate(value):
        check_tensor(f"{name}[{e}]", tensor, shape=shape, dtypes=dtypes, device=device)
