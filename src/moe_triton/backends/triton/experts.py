"""The experts op on the triton backend: which kernel runs after which. Records and their shapes: `moe_triton.records`.

Forward: up, down, combine. Backward: d_hidden, then the gradients that are wanted.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from moe_triton.records import (
    ExpertCall,
    ExpertGradients,
    ExpertWeight,
    ParameterGradients,
    RowGradients,
    Wanted,
    as_given,
)
from moe_triton.reference import dequantized
from moe_triton_kernels.combine import combine
from moe_triton_kernels.configs import choose_config
from moe_triton_kernels.d_hidden import d_hidden, d_router_weights
from moe_triton_kernels.d_weight import d_bias, d_weight
from moe_triton_kernels.down import down
from moe_triton_kernels.launch import Config, target_of
from moe_triton_kernels.operands import per_expert
from moe_triton_kernels.tiles import TileTables, tile_tables
from moe_triton_kernels.up import up

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Problem:
    """One call as the kernels take it: contiguous tensors, the sizes, and the configuration of each kernel.

    gate_up and down are as the forward product reads them: [d, n or 2n] and [n, d].
    """

    def __init__(self, call: ExpertCall) -> None:
        if call.hidden.dtype not in DTYPES:
            raise TypeError(f"hidden: the triton backend takes float32, float16 or bfloat16, got {call.hidden.dtype}")
        spec, parameters = call.spec, call.parameters
        if call.gate_up_lora is not None or call.down_lora is not None:
            raise NotImplementedError("gate_up_lora, down_lora: got adapters for backend 'triton', wanted 'torch'")
        self.call, self.spec, self.dispatched = call, spec, call.dispatched
        self.hidden, self.weights = call.hidden.contiguous(), call.weights.contiguous()
        self.top_k, self.num_rows = call.dispatched.top_k, call.num_rows
        self.size_d, self.size_n = call.hidden_size, call.intermediate_size
        gate_up, down = (per_expert(dequantized(p, call.hidden.dtype)) for p in parameters[:2])
        self.gate_up = gate_up if spec.is_transposed else gate_up.transposed()
        self.down = down if spec.is_transposed else down.transposed()
        self.gate_up_bias = None if parameters.gate_up_bias is None else per_expert(parameters.gate_up_bias)
        self.down_bias = None if parameters.down_bias is None else per_expert(parameters.down_bias)

    def tiles(self) -> TileTables:
        return tile_tables(self.dispatched.offsets, self.num_rows)

    def config(self, op: str) -> Config:
        gated = "_gated" if self.spec.is_gated and op in ("up", "d_hidden") else ""
        return choose_config(
            op + gated,
            d=self.size_d,
            n=self.size_n,
            dtype=self.hidden.dtype,
            num_rows=self.num_rows,
            num_experts=self.call.num_experts,
            architecture=target_of(self.hidden.device).architecture,
        )

    def up(self, tiles: TileTables, *, keep_a: bool, keep_h: bool) -> tuple[Tensor, Tensor]:
        """Activation [S, n] and pre-activation [S, 2n or n]; empty [0] where not kept."""
        return up(
            self.hidden,
            self.dispatched.source,
            tiles,
            self.gate_up,
            self.gate_up_bias,
            size_n=self.size_n,
            top_k=self.top_k,
            activation=self.spec.activation,
            is_concatenated=self.spec.is_concatenated,
            keep_activation=keep_a,
            keep_preactivation=keep_h,
            config=self.config("up"),
        )

    def down_rows(self, a: Tensor, tiles: TileTables) -> Tensor:
        """Every row's output times its router weight [S, d]."""
        return down(
            a,
            tiles,
            self.down,
            size_columns=self.size_d,
            config=self.config("down"),
            bias=self.down_bias,
            router_weights=self.weights,
            source=self.dispatched.source,
        )

    def d_hidden(self, grad_out: Tensor, h: Tensor, tiles: TileTables) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted activation [S, n], pre-activation's gradient, and shares of the router weights' gradient."""
        return d_hidden(
            grad_out,
            self.dispatched.source,
            tiles,
            self.down.transposed(),
            h,
            self.weights,
            size_n=self.size_n,
            activation=self.spec.activation,
            is_concatenated=self.spec.is_concatenated,
            config=self.config("d_hidden"),
        )

    def d_router_weights(self, shares: Tensor, grad_out: Tensor, tiles: TileTables) -> Tensor:
        return d_router_weights(shares, grad_out, self.dispatched.source, tiles, self.down_bias, self.weights)

    def d_rows(self, grad_h: Tensor, tiles: TileTables) -> Tensor:
        """Every row's gradient of its token [S, d]."""
        return down(
            grad_h,
            tiles,
            self.gate_up.transposed(),
            size_columns=self.size_d,
            config=self.config("d_rows"),
        )

    def combine(self, rows: Tensor) -> Tensor:
        return combine(rows, self.dispatched.position, self.hidden.dtype)

    def d_gate_up(self, grad_h: Tensor) -> Tensor:
        """[E, 2n, d], or [E, d, 2n] where transposed."""
        return self._d_weight(self.hidden, grad_h, tokens_first=self.spec.is_transposed)

    def d_down(self, grad_out: Tensor, weighted_a: Tensor) -> Tensor:
        """[E, d, n], or [E, n, d] where transposed."""
        return self._d_weight(grad_out, weighted_a, tokens_first=not self.spec.is_transposed)

    def _d_weight(self, tokens: Tensor, rows: Tensor, *, tokens_first: bool) -> Tensor:
        """tokens^T rows, contracted over each expert's rows, or its transpose where not `tokens_first`.

        `tokens` [T, ...] is gathered by row -> token; `rows` [S, ...] lies in expert order.
        """
        left, right = (tokens, rows) if tokens_first else (rows, tokens)
        return d_weight(
            left,
            right,
            self.dispatched.source,
            self.dispatched.offsets,
            top_k=self.top_k,
            gather_left=tokens_first,
            config=self.config("d_weight"),
        )

    def d_gate_up_bias(self, grad_h: Tensor) -> Tensor:
        return self._d_bias(grad_h)

    def d_down_bias(self, grad_out: Tensor) -> Tensor:
        return self._d_bias(grad_out, self.weights)

    def _d_bias(self, values: Tensor, router_weights: Tensor | None = None) -> Tensor:
        """The sum of each expert's rows, [E, ...]."""
        if values.shape[1] == 0:  # d or n is 0: there is nothing to launch a grid for
            return values.new_zeros(self.call.num_experts, 0)
        source, offsets = self.dispatched.source, self.dispatched.offsets
        return d_bias(values, source, offsets, top_k=self.top_k, router_weights=router_weights)


def experts_forward(call: ExpertCall, keep_preactivation: bool) -> tuple[Tensor, Tensor]:
    """Return out [T, d] and the pre-activation H [S, 2n] ([S, n] ungated; empty [0] if not kept), in hidden's dtype.

    The bits of `out` do not depend on `keep_preactivation`. Rows of H past offsets[E] are not written.
    Raises TypeError on a dtype other than float32, float16 and bfloat16.
    """
    problem = Problem(call)
    if problem.num_rows == 0:
        return torch.zeros_like(call.hidden), call.hidden.new_zeros((0, call.width) if keep_preactivation else 0)
    tiles = problem.tiles()
    a, h = problem.up(tiles, keep_a=True, keep_h=keep_preactivation)
    return problem.combine(problem.down_rows(a, tiles)), h


def experts_backward(call: ExpertCall, grad_out: Tensor, preactivation: Tensor, wanted: Wanted) -> ExpertGradients:
    """Return the gradients that are wanted.

    An empty `preactivation` is recomputed from `hidden`. A sequence of parameters gets a list of views of one tensor.
    """
    rows = experts_backward_rows(call, grad_out, preactivation, wanted)
    return ExpertGradients(rows.hidden, rows.weights, *experts_backward_weights(call, grad_out, rows, wanted))


def experts_backward_rows(call: ExpertCall, grad_out: Tensor, preactivation: Tensor, wanted: Wanted) -> RowGradients:
    """Compute the first half of `experts_backward`: what a sender waits for, and what the second half needs of it."""
    problem, hidden = Problem(call), call.hidden
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
    weighted_a, grad_h, shares = problem.d_hidden(grad_out, preactivation, tiles)
    return RowGradients(
        hidden=problem.combine(problem.d_rows(grad_h, tiles)) if wanted.hidden else None,
        weights=problem.d_router_weights(shares, grad_out, tiles) if wanted.weights else None,
        preactivation=grad_h,
        weighted_a=weighted_a,
    )


def experts_backward_weights(
    call: ExpertCall, grad_out: Tensor, row_grads: RowGradients, wanted: Wanted
) -> ParameterGradients:
    """Compute the second half of `experts_backward`."""
    problem, given, wanted = Problem(call), call.parameters, wanted.of(call.parameters)
    if problem.num_rows == 0:
        return ParameterGradients(
            *(zeros_like(cast(ExpertWeight, p)) if want else None for p, want in zip(given, wanted[2:], strict=True))
        )
    grad_out, grad_h = grad_out.contiguous(), row_grads.preactivation
    grads = (
        problem.d_gate_up(grad_h) if wanted.gate_up else None,
        problem.d_down(grad_out, row_grads.weighted_a) if wanted.down else None,
        problem.d_gate_up_bias(grad_h) if wanted.gate_up_bias else None,
        problem.d_down_bias(grad_out) if wanted.down_bias else None,
        *(None,) * 4,
    )
    return ParameterGradients(*(as_given(p, grad) for p, grad in zip(given, grads, strict=True)))


def combine_rows(rows: Tensor, position: Tensor) -> Tensor:
    """Sum each token's rows [R, d] in the order of position [T, J], where -1 adds nothing: [T, d]."""
    if rows.shape[0] == 0 or position.numel() == 0:
        return rows.new_zeros(position.shape[0], rows.shape[1])
    return combine(rows, position.int(), rows.dtype)


def zeros_like(parameter: ExpertWeight) -> ExpertWeight:
    return torch.zeros_like(parameter) if isinstance(parameter, Tensor) else [torch.zeros_like(p) for p in parameter]
