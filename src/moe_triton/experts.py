"""The experts: gather -> up -> activation -> down, times the router weight -> combine.

Definition: `moe_triton.reference.moe_mlp`. Saved for backward: the hidden states, the pre-activation, the router
weights and the dispatch; nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_triton import reference, runtime
from moe_triton.autograd.experts import Weights, run_experts_under_autograd
from moe_triton.checks import FLOATS, INTEGERS, check_choice, check_tensor
from moe_triton.dispatch import dispatch as make_dispatch
from moe_triton.records import ACTIVATIONS, Dispatch, ExpertSpec


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
    num_tokens, _ = check_tensor("hidden_states", hidden_states, shape=("T", "d"), dtypes=FLOATS).shape
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
        weights_TK = weights_TK.float()
    name = runtime.choose(backend, device, hidden_states.dtype).name
    parameters = (gate_up_proj, down_proj, gate_up_bias, down_bias)
    with torch.autocast(device.type, enabled=False):
        if name == "reference":
            out = reference.moe_mlp(hidden_states, weights_TK, plan, *parameters, spec)
        else:
            out = run_experts_under_autograd(hidden_states, weights_TK, plan, *parameters, spec, recompute, name)
    return out.to(dtype)


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
    check_expert_tensors(
        "gate_up_proj", gate_up_proj, num_experts, (width, rows) if flip else (rows, width), hidden_states
    )
    check_expert_tensors("down_proj", down_proj, num_experts, (inner, width) if flip else (width, inner), hidden_states)
    if gate_up_bias is not None:
        check_expert_tensors("gate_up_bias", gate_up_bias, num_experts, (rows,), hidden_states)
    if down_bias is not None:
        check_expert_tensors("down_bias", down_bias, num_experts, (width,), hidden_states)


def check_expert_tensors(name: str, value: Weights, num_experts: int, shape: tuple[int, ...], like: Tensor) -> None:
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
