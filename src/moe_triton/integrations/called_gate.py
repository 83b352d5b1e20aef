"""The experts of a model whose gate we do not know: our products, with the model's own gate called between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_triton.autograd.grouped import grouped_linear
from moe_triton.dispatch import dispatch
from moe_triton.quantization import QuantizedWeight
from moe_triton.records import Lora, Projection
from moe_triton.reference import wide


def called_gate_mlp(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up_proj: Projection,
    down_proj: Projection,
    gate: Callable[[Tensor], Tensor],
    *,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    up_lora: Sequence[Lora] | None = None,
    down_lora: Sequence[Lora] | None = None,
    is_transposed: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Compute `moe_triton.moe_mlp` with `gate`, any differentiable function of rows [S, m] -> [S, n], as activation.

    Shapes and dtypes as in `moe_mlp`, but up_proj [E, m, d] may have any number m of rows, and weights are stacked or
    quantised; of the latter autograd keeps the numbers, in the products' dtype, until backward.
    `gate` sees each assignment's pre-activation once, in expert order, and rows of zeros for the skipped slots.
    `backend` makes the dispatch; the products run in torch. Returns [T, d] in hidden_states' dtype.
    """
    dtype = hidden_states.dtype
    if torch.is_autocast_enabled(hidden_states.device.type):
        compute = torch.get_autocast_dtype(hidden_states.device.type)
        hidden_states = hidden_states.to(compute)
        up_bias, down_bias = (None if x is None else x.to(compute) for x in (up_bias, down_bias))
    up, down = (stacked(x, hidden_states.dtype) for x in (up_proj, down_proj))
    dispatched = dispatch(top_k_index, up.shape[0], backend=backend)
    token_S = dispatched.source.long().clamp_min(0) // dispatched.top_k
    x_Sd = hidden_states[token_S]
    h_Sm = grouped_linear(x_Sd, up, up_bias, dispatched.offsets, is_transposed)
    h_Sm = _adapted(h_Sm, x_Sd, up_lora, dispatched.offsets)
    a_Sn = gate(h_Sm).to(down.dtype)
    y_Sd = grouped_linear(a_Sn, down, down_bias, dispatched.offsets, is_transposed)
    y_Sd = _adapted(y_Sd, a_Sn, down_lora, dispatched.offsets)
    kept_TK1 = (dispatched.position >= 0)[..., None]
    rows_TKd = torch.where(kept_TK1, y_Sd[dispatched.position.long().clamp_min(0)], 0).to(wide(dtype))
    return (rows_TKd * top_k_weights[..., None]).sum(1).to(dtype)


def stacked(projection: Projection, dtype: torch.dtype) -> Tensor:
    """Return a stacked projection, or the numbers of a quantised one, in `dtype`."""
    if isinstance(projection, (Tensor, QuantizedWeight)):
        return projection.to(dtype) if isinstance(projection, Tensor) else projection.dequantize(dtype)
    raise TypeError("projection: got a sequence, wanted a stacked Tensor or a QuantizedWeight")


def _adapted(product_S: Tensor, x_S: Tensor, adapters: Sequence[Lora] | None, offsets: Tensor) -> Tensor:
    """Add scaling * (x A^T) B^T of every adapter to the product."""
    for lora in adapters or ():
        low_rank = grouped_linear(x_S, lora.a.to(x_S.dtype), None, offsets, False)
        product_S = product_S + lora.scaling * grouped_linear(low_rank, lora.b.to(x_S.dtype), None, offsets, False)
    return product_S
