"""Routing by the Triton kernels; the definition is `reference.route`."""

from __future__ import annotations

from torch import Tensor

from moe_triton.records import RouterSpec
from moe_triton_kernels.routing import topk_forward
from moe_triton_kernels.routing_backward import topk_backward


def route_forward(
    logits: Tensor, spec: RouterSpec, choice_bias: Tensor | None, noise: Tensor | None, token_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits [T, E] -> experts [T, K] i32, weights [T, K] f32, counts [E] i32, score_sums [E] f32, z_sum [] f32."""
    return topk_forward(
        logits,
        spec.top_k,
        score=spec.score,
        normalize=spec.normalize,
        scale=spec.scale,
        num_groups=spec.num_groups,
        top_groups=spec.top_groups,
        group_score=spec.group_score,
        choice_bias=choice_bias,
        noise=noise,
        token_mask=token_mask,
    )


def route_backward(
    grad_weights: Tensor, grad_score_sums: Tensor, grad_z_sum: Tensor, logits: Tensor, experts: Tensor, spec: RouterSpec
) -> Tensor:
    """The gradient of the logits [T, E] in their dtype; zeros for masked tokens, whose experts are -1."""
    return topk_backward(
        grad_weights,
        grad_score_sums,
        grad_z_sum,
        logits,
        experts,
        score=spec.score,
        normalize=spec.normalize,
        scale=spec.scale,
    )
