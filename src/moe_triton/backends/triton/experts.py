"""The experts op on the triton backend: which kernel runs after which. Shapes as in `moe_triton.reference.moe_mlp`.

Forward: up, down, combine. Backward: d_hidden, then the gradients that are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_triton.records import ExpertSpec
from moe_triton_kernels.combine import combine
from moe_triton_kernels.configs import choose_config
from moe_triton_kernels.d_hidden import d_hidden, d_router_weights
from moe_triton_kernels.d_weight import d_bias, d_weight
from moe_triton_kernels.down import down
from moe_triton_kernels.grouped_gemm import per_expert
from moe_triton_kernels.launch import Config, target_of
from moe_triton_kernels.tiles import TileTables, tile_tables
from moe_triton_kernels.up import up

Weights = Tensor | Sequence[Tensor]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Problem:
    """The sizes of one call, its parameters as kernels read them, and the configuration of each kernel."""

    def __init__(
        self,
        hidden: Tensor,
        offsets: Tensor,
        source: Tensor,
        position: Tensor,
        gate_up_proj: Weights,
        down_proj: Weights,
        gate_up_bias: Weights | None,
        down_bias: Weights | None,
        spec: ExpertSpec,
    ) -> None:
        if hidden.dtype not in DTYPES:
            raise TypeError(f"hidden: the triton backend takes float32, float16 or bfloat16, got {hidden.dtype}")
        self.spec, self.top_k = spec, position.shape[1]
        self.num_rows, self.num_experts = source.shape[0], offsets.shape[0] - 1
        self.dtype, self.device, self.size_d = hidden.dtype, hidden.device, hidden.shape[1]
        # as the forward product reads them: gate_up [d, n or 2n], down [n, d]
        weights = [per_expert(proj) for proj in (gate_up_proj, down_proj)]
        self.gate_up, self.down = weights if spec.is_transposed else [weight.transposed() for weight in weights]
        self.gate_up_bias = None if gate_up_bias is None else per_expert(gate_up_bias)
        self.down_bias = None if down_bias is None else per_expert(down_bias)
        self.size_n = down_proj[0].shape[0 if spec.is_transposed else 1]

    def config(self, op: str) -> Config:
        gated = "_gated" if self.spec.is_gated and op in ("up", "d_hidden") else ""
        return choose_config(
            op + gated,
            d=self.size_d,
            n=self.size_n,
            dtype=self.dtype,
            num_rows=self.num_rows,
            num_experts=self.num_experts,
            architecture=target_of(self.device).architecture,
        )

    def up(
        self, hidden: Tensor, source: Tensor, tiles: TileTables, *, keep_a: bool, keep_h: bool
    ) -> tuple[Tensor, Tensor]:
        return up(
            hidden,
            source,
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


def experts_forward(
    hidden: Tensor,
    weights: Tensor,
    offsets: Tensor,
    source: Tensor,
    position: Tensor,
    gate_up_proj: Weights,
    down_proj: Weights,
    gate_up_bias: Weights | None,
    down_bias: Weights | None,
    spec: ExpertSpec,
    keep_preactivation: bool,
) -> tuple[Tensor, Tensor]:
    """out [T, d] and the pre-activation H [S, 2n] ([S, n] ungated; an empty [0] tensor if not kept), in hidden's dtype.

    The bits of `out` do not depend on `keep_preactivation`. Rows of H past offsets[E] are not written.
    Raises TypeError on a dtype other than float32, float16 and bfloat16.
    """
    problem = Problem(hidden, offsets, source, position, gate_up_proj, down_proj, gate_up_bias, down_bias, spec)
    if problem.num_rows == 0:
        width = 2 * problem.size_n if spec.is_gated else problem.size_n
        return torch.zeros_like(hidden), hidden.new_zeros((0, width) if keep_preactivation else 0)
    tiles = tile_tables(offsets, problem.num_rows)
    hidden, weights = hidden.contiguous(), weights.contiguous()
    a, h = problem.up(hidden, source, tiles, keep_a=True, keep_h=keep_preactivation)
    rows = down(
        a,
        tiles,
        problem.down,
        size_columns=problem.size_d,
        config=problem.config("down"),
        bias=problem.down_bias,
        router_weights=weights,
        source=source,
    )
    return combine(rows, position, hidden.dtype), h


def experts_backward(
    grad_out: Tensor,
    hidden: Tensor,
    preactivation: Tensor,
    weights: Tensor,
    offsets: Tensor,
    source: Tensor,
    position: Tensor,
    gate_up_proj: Weights,
    down_proj: Weights,
    gate_up_bias: Weights | None,
    down_bias: Weights | None,
    spec: ExpertSpec,
    needs: tuple[bool, bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Weights | None, Weights | None, Weights | None, Weights | None]:
    """Gradients of (hidden, weights, gate_up_proj, down_proj, gate_up_bias, down_bias); None where `needs` is False.

    An empty `preactivation` is recomputed from `hidden`. A sequence of parameters gets a list of views of one tensor.
    """
    given = (weights, offsets, source, position, gate_up_proj, down_proj, gate_up_bias, down_bias, spec, needs)
    grad_hidden, grad_weights, grad_h, weighted_a = experts_backward_rows(grad_out, hidden, preactivation, *given)
    return (grad_hidden, grad_weights, *experts_backward_weights(grad_out, hidden, grad_h, weighted_a, *given))


def experts_backward_rows(
    grad_out: Tensor,
    hidden: Tensor,
    preactivation: Tensor,
    weights: Tensor,
    offsets: Tensor,
    source: Tensor,
    position: Tensor,
    gate_up_proj: Weights,
    down_proj: Weights,
    gate_up_bias: Weights | None,
    down_bias: Weights | None,
    spec: ExpertSpec,
    needs: tuple[bool, bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """The first half of `experts_backward`: what a sender waits for, and what the second half needs of it.

    Returns the gradients of hidden and of weights (None where not needed), the pre-activation's gradient [S, 2n] or
    [S, n], and the weighted activation [S, n]; rows past offsets[E] of the last two are not written.
    """
    problem = Problem(hidden, offsets, source, position, gate_up_proj, down_proj, gate_up_bias, down_bias, spec)
    if problem.num_rows == 0:
        width = 2 * problem.size_n if spec.is_gated else problem.size_n
        return (
            torch.zeros_like(hidden) if needs[0] else None,
            torch.zeros_like(weights) if needs[1] else None,
            hidden.new_zeros(0, width),
            hidden.new_zeros(0, problem.size_n),
        )
    hidden, grad_out, weights = hidden.contiguous(), grad_out.contiguous(), weights.contiguous()
    if not any(needs[:5]):
        return None, None, hidden.new_empty(0), hidden.new_empty(0)
    tiles = tile_tables(offsets, problem.num_rows)
    if preactivation.numel() == 0:
        _, preactivation = problem.up(hidden, source, tiles, keep_a=False, keep_h=True)
    weighted_a, grad_h, shares = d_hidden(
        grad_out,
        source,
        tiles,
        problem.down.transposed(),
        preactivation,
        weights,
        size_n=problem.size_n,
        activation=spec.activation,
        is_concatenated=spec.is_concatenated,
        config=problem.config("d_hidden"),
    )
    grad_hidden = grad_weights = None
    if needs[1]:
        grad_weights = d_router_weights(shares, grad_out, source, tiles, problem.down_bias, weights)
    if needs[0]:
        grad_rows = down(
            grad_h,
            tiles,
            problem.gate_up.transposed(),
            size_columns=problem.size_d,
            config=problem.config("d_rows"),
        )
        grad_hidden = combine(grad_rows, position, hidden.dtype)
    return grad_hidden, grad_weights, grad_h, weighted_a


def experts_backward_weights(
    grad_out: Tensor,
    hidden: Tensor,
    grad_h: Tensor,
    weighted_a: Tensor,
    weights: Tensor,
    offsets: Tensor,
    source: Tensor,
    position: Tensor,
    gate_up_proj: Weights,
    down_proj: Weights,
    gate_up_bias: Weights | None,
    down_bias: Weights | None,
    spec: ExpertSpec,
    needs: tuple[bool, bool, bool, bool, bool, bool],
) -> tuple[Weights | None, Weights | None, Weights | None, Weights | None]:
    """The second half of `experts_backward`: the gradients of gate_up_proj, down_proj, gate_up_bias and down_bias."""
    problem = Problem(hidden, offsets, source, position, gate_up_proj, down_proj, gate_up_bias, down_bias, spec)
    parameters = (gate_up_proj, down_proj, gate_up_bias, down_bias)
    need_gate_up, need_down, need_gate_up_bias, need_down_bias = needs[2:]
    if problem.num_rows == 0:
        wanted = zip(parameters, needs[2:], strict=True)
        zeros = [zero_gradient(p) if need and p is not None else None for p, need in wanted]
        return zeros[0], zeros[1], zeros[2], zeros[3]
    hidden, grad_out, weights = hidden.contiguous(), grad_out.contiguous(), weights.contiguous()
    top_k = problem.top_k
    grad_gate_up = grad_down = grad_gate_up_bias = grad_down_bias = None
    if need_down:  # [d, n], or [n, d] where transposed
        grad_down = weight_gradient(problem, grad_out, weighted_a, source, offsets, tokens_first=not spec.is_transposed)
    if need_gate_up:  # [2n, d], or [d, 2n] where transposed
        grad_gate_up = weight_gradient(problem, hidden, grad_h, source, offsets, tokens_first=spec.is_transposed)
    if need_gate_up_bias and gate_up_bias is not None:
        grad_gate_up_bias = d_bias(grad_h, source, offsets, top_k=top_k)
    if need_down_bias and down_bias is not None:
        grad_down_bias = d_bias(grad_out, source, offsets, top_k=top_k, router_weights=weights)
    return (
        as_given(grad_gate_up, gate_up_proj),
        as_given(grad_down, down_proj),
        as_given(grad_gate_up_bias, gate_up_bias),
        as_given(grad_down_bias, down_bias),
    )


def combine_rows(rows: Tensor, position: Tensor) -> Tensor:
    """[T, d]: the sum of each token's rows [R, d], in the order of position [T, J]; -1 adds nothing."""
    if rows.shape[0] == 0 or position.numel() == 0:
        return rows.new_zeros(position.shape[0], rows.shape[1])
    return combine(rows, position.int(), rows.dtype)


def weight_gradient(
    problem: Problem, tokens: Tensor, rows: Tensor, source: Tensor, offsets: Tensor, *, tokens_first: bool
) -> Tensor:
    """tokens^T rows, contracted over each expert's rows, or its transpose where not `tokens_first`.

    `tokens` [T, ...] is gathered by row -> token; `rows` [S, ...] lies in expert order.
    """
    left, right = (tokens, rows) if tokens_first else (rows, tokens)
    return d_weight(
        left,
        right,
        source,
        offsets,
        top_k=problem.top_k,
        gather_left=tokens_first,
        config=problem.config("d_weight"),
    )


def zero_gradient(parameter: Weights) -> Weights:
    return torch.zeros_like(parameter) if isinstance(parameter, Tensor) else [torch.zeros_like(p) for p in parameter]


def as_given(gradient: Tensor | None, parameter: Weights | None) -> Weights | None:
    """A gradient in the form of its parameter: stacked, or a list with one view per expert."""
    if gradient is None or isinstance(parameter, Tensor):
        return gradient
    return list(gradient.unbind(0))
