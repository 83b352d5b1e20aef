"""Experts of DeepSpeed and Colossal-AI, here or over ranks: MLPs run fused, any other module is called on its own rows.

Shapes: R rows of tokens, J choices of a row, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moe_triton.autograd.experts import run_experts
from moe_triton.distributed import ExpertParallel
from moe_triton.distributed.exchange.opaque_experts import OpaqueCall, exchange_opaque
from moe_triton.distributed.exchange.stages import ExchangedLayer
from moe_triton.experts import check_call
from moe_triton.records import Dispatch, ExpertCall
from moe_triton.reference import wide


def call_one_by_one(
    experts: Sequence[Callable[[Tensor], Any]], hidden_states: Tensor, weights: Tensor, dispatched: Dispatch
) -> Tensor:
    """hidden_states [R, d], weights [R, J], a Dispatch of the R rows -> weighted sums [R, d]; one host sync.

    An expert maps [1, 1, rows, d] (four dimensions, as DeepSpeed has) to the same shape, or to a tuple that begins with
    it.
    """
    bounds = dispatched.offsets.tolist()
    size_d, num_rows = hidden_states.shape[1], bounds[-1]
    rows_Sd = hidden_states[dispatched.source[:num_rows].long() // dispatched.top_k]
    outs = []
    for expert, (start, end) in zip(experts, pairwise(bounds), strict=True):
        # an idle expert sees a row of zeros, so that its gradients are zeros and not None
        rows = rows_Sd[start:end] if start < end else hidden_states.new_zeros(1, size_d)
        out = expert(rows[None, None])
        out = out[0] if isinstance(out, tuple) else out
        outs.append(out.reshape(-1, size_d)[: end - start])
    outs.append(outs[0].new_zeros(1, size_d))  # the row of the choices that were dropped or skipped
    position = torch.where(dispatched.position < 0, num_rows, dispatched.position).long()
    rows_RJd = torch.cat(outs)[position].to(wide(hidden_states.dtype))
    return (rows_RJd * weights[..., None]).sum(1).to(hidden_states.dtype)


def compute_experts(call: ExpertCall | OpaqueCall, parallel: ExpertParallel | None, layer: ExchangedLayer, /) -> Tensor:
    """Return the experts' outputs [T, d], over the ranks of `parallel` where that is not None."""
    if isinstance(call, ExpertCall):
        if parallel is not None:
            return parallel.run(call, layer)
        check_call(call, layer.backend)
        return run_experts(call, backend=layer.backend)
    if parallel is None:
        return call.compute(call.hidden, call.weights, call.dispatched)
    return exchange_opaque(call, parallel, layer)
