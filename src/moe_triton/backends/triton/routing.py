"""Routing by the Triton kernels; the definition is `reference.route`."""

from __future__ import annotations

from torch import Tensor

from moe_triton.records import RouterSpec
from moe_triton_kernels.routing import TopK, topk_forward
from moe_triton_kernels.routing_backward import topk_backward


def route_forward(
    logits: Tensor,
    spec: RouterSpec,
    choice_bias: Tensor | None,
    noise: Tensor | None,
    token_mask: Tensor | None,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits [T, E] -> experts [T, K] i32, weights [T, K] f32, counts [E] i32, score_sums [E] f32, z_sum [] f32."""
    return topk_forward(
        logits, options_of(spec), choice_bias=choice_bias, noise=noise, token_mask=token_mask, given=given
    )


def route_backward(
    grad_weights: Tensor, grad_score_sums: Tensor, grad_z_sum: Tensor, logits: Tensor, experts: Tensor, spec: RouterSpec
) -> Tensor:
    """The gradient of the logits [T, E] in their dtype; zeros for masked tokens, whose experts are -1."""
    return topk_backward(grad_weights, grad_score_sums, grad_z_sum, logits, experts, options_of(spec))


def options_of(spec: RouterSpec) -> TopK:
    return TopK(*(getattr(spec, name) for name in TopK._fields))
