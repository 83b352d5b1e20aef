"""The experts of a model whose gate we do not know: our products, with the model's own gate called between them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_triton.autograd.grouped import grouped_linear
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
    """Compute `moe_triton.moe_mlp` with `gate`, any differentiable function of rows [S, m] -> [S, n], as activation.

    Shapes and dtypes as in `moe_mlp`, but up_proj [E, m, d] may have any number m of rows, and weights are stacked.
    `gate` sees each assignment's pre-activation once, in expert order, and rows of zeros for the skipped slots.
    `backend` makes the dispatch; the products run in torch. Returns [T, d] in hidden_states' dtype.
    """
    dtype = hidden_states.dtype
    if torch.is_autocast_enabled(hidden_states.device.type):
        compute = torch.get_autocast_dtype(hidden_states.device.type)
        hidden_states, up_proj, down_proj = (x.to(compute) for x in (hidden_states, up_proj, down_proj))
        up_bias, down_bias = (None if x is None else x.to(compute) for x in (up_bias, down_bias))
    dispatched = dispatch(top_k_index, up_proj.shape[0], backend=backend)
    token_S = dispatched.source.long().clamp_min(0) // dispatched.top_k
    h_Sm = grouped_linear(hidden_states[token_S], up_proj, up_bias, dispatched.offsets, is_transposed)
    a_Sn = gate(h_Sm).to(down_proj.dtype)
    y_Sd = grouped_linear(a_Sn, down_proj, down_bias, dispatched.offsets, is_transposed)
    kept_TK1 = (dispatched.position >= 0)[..., None]
    rows_TKd = torch.where(kept_TK1, y_Sd[dispatched.position.long().clamp_min(0)], 0).to(wide(dtype))
    return (rows_TKd * top_k_weights[..., None]).sum(1).to(dtype)
