"""The experts op on the triton backend: which kernel runs after which. Records and their shapes: `moe_triton.records`.

Forward: up, down, combine. Backward: d_hidden, then the gradients that are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from moe_triton.backends.triton.fp8_problem import problem_of
from moe_triton.backends.triton.parameters import check_dtype
from moe_triton.backends.triton.problem import Problem
from moe_triton.records import (
    ExpertCall,
    ExpertGradients,
    ExpertWeight,
    ParameterGradients,
    RowGradients,
    Wanted,
    as_given,
)
from moe_triton_kernels.combine import combine
from moe_triton_kernels.configs import choose_config
from moe_triton_kernels.down import down
from moe_triton_kernels.heuristics import BUCKETS
from moe_triton_kernels.launch import target_of
from moe_triton_kernels.operands import per_expert
from moe_triton_kernels.tiles import tile_tables


def experts_forward(call: ExpertCall, keep_preactivation: bool) -> tuple[Tensor, Tensor]:
    """Return out [T, d] and the pre-activation H [S, 2n] ([S, n] ungated; empty [0] if not kept), in hidden's dtype.

    The bits of `out` do not depend on `keep_preactivation`. Rows of H past offsets[E] are not written.
    Raises TypeError on a dtype other than float32, float16 and bfloat16.
    """
    problem = problem_of(call)
    if problem.num_rows == 0:
        return torch.zeros_like(call.hidden), call.hidden.new_zeros((0, call.width) if keep_preactivation else 0)
    tiles = problem.tiles()
    a, h = problem.up(tiles, keep_a=True, keep_h=keep_preactivation)
    return problem.combine(problem.down_rows(a, tiles)), h


def experts_backward(call: ExpertCall, grad_out: Tensor, preactivation: Tensor, wanted: Wanted) -> ExpertGradients:
    """Return the gradients that are wanted.

    An empty `preactivation` is recomputed from `hidden`. A sequence of parameters gets a list of views of one tensor.
    """
    problem = problem_of(call)
    rows = _backward_rows(problem, grad_out, preactivation, wanted)
    return ExpertGradients(rows.hidden, rows.weights, *_backward_weights(problem, grad_out, rows, wanted))


def experts_backward_rows(call: ExpertCall, grad_out: Tensor, preactivation: Tensor, wanted: Wanted) -> RowGradients:
    """Compute the first half of `experts_backward`: what a sender waits for, and what the second half needs of it."""
    return _backward_rows(problem_of(call), grad_out, preactivation, wanted)


def _backward_rows(problem: Problem, grad_out: Tensor, preactivation: Tensor, wanted: Wanted) -> RowGradients:
    call, hidden = problem.call, problem.call.hidden
    if problem.num_rows == 0:
        return RowGradients(
            hidden=torch.zeros_like(hidden) if wanted.hidden else None,
            weights=torch.zeros_like(call.weights) if wanted.weights else None,
            preactivation=hidden.new_zeros(0, call.width),
            weighted_a=hidden.new_zeros(0, call.intermediate_size),
        )
    if not any(wanted._replace(down_bias=False)):  # the down bias alone needs neither
        return RowGradients(None, None, hidden.new_empty(0), hidden.new_empty(0))
    grad_out, tiles = grad_out.contiguous(), problem.tiles()
    if preactivation.numel() == 0:
        _, preactivation = problem.up(tiles, keep_a=False, keep_h=True)
    down_u = problem.u_down(grad_out, tiles)
    weighted_a, grad_h, shares = problem.d_hidden(grad_out, preactivation, tiles, down_u, wanted)
    gate_up_u = problem.u_gate_up(problem.numbers(grad_h), tiles) if wanted.hidden else None
    return RowGradients(
        hidden=problem.combine(problem.d_rows(grad_h, tiles, gate_up_u)) if wanted.hidden else None,
        weights=problem.d_router_weights(shares, grad_out, tiles) if wanted.weights else None,
        preactivation=grad_h,
        weighted_a=weighted_a,
        gate_up_u=gate_up_u,
        down_u=down_u,
    )


def experts_backward_weights(
    call: ExpertCall, grad_out: Tensor, row_grads: RowGradients, wanted: Wanted
) -> ParameterGradients:
    """Compute the second half of `experts_backward`."""
    return _backward_weights(problem_of(call), grad_out, row_grads, wanted)


def _backward_weights(
    problem: Problem, grad_out: Tensor, row_grads: RowGradients, wanted: Wanted
) -> ParameterGradients:
    given = problem.call.parameters
    wanted = wanted.of(given)
    if problem.num_rows == 0:
        return ParameterGradients(
            *(zeros_like(cast(ExpertWeight, p)) if want else None for p, want in zip(given, wanted[2:], strict=True))
        )
    grad_out, grad_h, weighted_a = grad_out.contiguous(), row_grads.preactivation, row_grads.weighted_a
    adapters: Sequence[Tensor | None] = (None,) * 4
    if problem.gate_up_lora is not None or problem.down_lora is not None:
        tiles = problem.tiles()
        adapters = (
            *problem.d_gate_up_lora(problem.numbers(grad_h), row_grads.gate_up_u, tiles, wanted),
            *problem.d_down_lora(grad_out, problem.numbers(weighted_a), row_grads.down_u, tiles, wanted),
        )
    grads = (
        problem.d_gate_up(grad_h) if wanted.gate_up else None,
        problem.d_down(grad_out, weighted_a) if wanted.down else None,
        problem.d_gate_up_bias(grad_h) if wanted.gate_up_bias else None,
        problem.d_down_bias(grad_out, weighted_a) if wanted.down_bias else None,
        *(None if x is None else x.contiguous() for x in adapters),
    )
    return ParameterGradients(*(as_given(p, grad) for p, grad in zip(given, grads, strict=True)))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x weight^T + bias, [m, out], such that a row's bits depend on this row alone: `down` with one expert.

    x [m, in], weight [out, in], bias [out]. Raises TypeError on a dtype other than float32, float16 and bfloat16.
    """
    check_dtype(x.dtype)
    (num_rows, size_in), size_out = x.shape, weight.shape[0]
    if num_rows == 0:
        return x.new_zeros(0, size_out)
    config = choose_config(
        "down", d=size_out, n=size_in, dtype=x.dtype, num_rows=BUCKETS[-1] + 1, num_experts=1,
        architecture=target_of(x.device).architecture,
    )  # fmt: skip
    offsets = torch.arange(2, dtype=torch.int32, device=x.device) * num_rows
    return down(
        x.contiguous(),
        tile_tables(offsets, num_rows),
        per_expert(weight[None]).transposed(),
        size_columns=size_out,
        config=config,
        bias=None if bias is None else per_expert(bias[None]),
    )


def combine_rows(rows: Tensor, position: Tensor) -> Tensor:
    """Sum each token's rows [R, d] in the order of position [T, J], where -1 adds nothing: [T, d]."""
    if rows.shape[0] == 0 or position.numel() == 0:
        return rows.new_zeros(position.shape[0], rows.shape[1])
    return combine(rows, position.int(), rows.dtype)


def zeros_like(parameter: ExpertWeight) -> ExpertWeight:
    return torch.zeros_like(parameter) if isinstance(parameter, Tensor) else [torch.zeros_like(p) for p in parameter]
