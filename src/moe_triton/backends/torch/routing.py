"""Routing in plain torch: top-k choices, weights, the sums that the losses need, and their gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_triton.records import RouterSpec
from moe_triton.reference import EPS, choice_keys, normalised_and_chosen, router_scores, unless_empty, wide


def top_choices(keys_TE: Tensor, top_k: int) -> Tensor:
    """Indices [T, K] int64 of the K highest keys, highest first; the lower index wins a tie."""
    if keys_TE.dtype != torch.float32:
        return keys_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    # torch.topk breaks ties as it likes, so ties are made impossible: fp32 bits above, the reversed index below.
    # Adding 0.0 turns -0.0 into 0.0; flipping a negative number's lower bits makes the bits sort like the floats.
    bits = (keys_TE + 0.0).view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    reversed_index = torch.arange(keys_TE.shape[1] - 1, -1, -1, device=keys_TE.device)
    return ((bits.long() << 32) | reversed_index).topk(top_k, dim=-1).indices


def route_forward(
    logits: Tensor,
    spec: RouterSpec,
    choice_bias: Tensor | None,
    noise: Tensor | None,
    token_mask: Tensor | None,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits [T, E] -> experts [T, K] int32, weights [T, K], counts [E] int32, score_sums [E], z_sum [].

    The floats are fp32, or fp64 for fp64 logits. A token that `token_mask` [T] leaves out has experts -1 and adds
    nothing to any sum. With B sequences, counts and score sums are [B, E]. Definition: `moe_triton.reference.route`.
    """
    num_experts = logits.shape[1]
    logits_TE = logits.to(wide(logits.dtype))
    experts_TK = top_choices(choice_keys(logits_TE, spec, choice_bias, noise), spec.top_k)
    if given is not None:
        experts_TK = unless_empty(given, experts_TK)
    probs_TE, weights_TK = normalised_and_chosen(logits_TE, experts_TK, spec)
    if spec.normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + EPS)
    weights_TK = weights_TK * spec.scale
    z_T = logits_TE.logsumexp(-1).square()
    if token_mask is not None:
        skipped_T = ~token_mask.bool()
        experts_TK = experts_TK.masked_fill(skipped_T[:, None], -1)
        weights_TK = weights_TK.masked_fill(skipped_T[:, None], 0.0)
        probs_TE = probs_TE.masked_fill(skipped_T[:, None], 0.0)
        z_T = z_T.masked_fill(skipped_T, 0.0)
    flat = experts_TK.masked_fill(experts_TK < 0, num_experts).reshape(spec.sequences, -1)
    # Integer adds commute, so scatter_add_ is deterministic; bin E takes the choices that are none.
    counts = torch.zeros(spec.sequences, num_experts + 1, dtype=torch.int32, device=logits.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.int32))
    counts, score_sums = counts[:, :num_experts], probs_TE.view(*shape_of_sums(logits, spec)).sum(1)
    if spec.sequences == 1:
        counts, score_sums = counts[0], score_sums[0]
    return experts_TK.int(), weights_TK, counts.contiguous(), score_sums, z_T.sum()


def shape_of_sums(logits: Tensor, spec: RouterSpec) -> tuple[int, int, int]:
    """[B, T / B, E], of which the middle one is summed over."""
    return spec.sequences, logits.shape[0] // spec.sequences, logits.shape[1]


def route_backward(
    grad_weights: Tensor, grad_score_sums: Tensor, grad_z_sum: Tensor, logits: Tensor, experts: Tensor, spec: RouterSpec
) -> Tensor:
    """Gradient of the logits, [T, E] in their dtype; zeros for the tokens whose experts are -1.

    grad_weights [T, K], grad_score_sums [E] and grad_z_sum [] are the gradients of the three differentiable outputs.
    """
    num_experts = logits.shape[1]
    logits_TE = logits.to(wide(logits.dtype))
    experts_TK = experts.long()
    grad_raw_TK = grad_weights.to(logits_TE.dtype) * spec.scale
    probs_TE, raw_TK = normalised_and_chosen(logits_TE, experts_TK, spec)
    if spec.normalize:  # w = raw / sum(raw)
        total_T1 = raw_TK.sum(-1, keepdim=True) + EPS
        mean_T1 = (grad_raw_TK * raw_TK).sum(-1, keepdim=True) / total_T1
        grad_raw_TK = (grad_raw_TK - mean_T1) / total_T1
    has_none_TK = (experts_TK < 0) | (experts_TK >= num_experts - spec.weightless)
    grad_raw_TK = grad_raw_TK.masked_fill(has_none_TK, 0.0)
    ids_TK = experts_TK.masked_fill(has_none_TK, 0)

    grad_probs_BE = grad_score_sums.to(logits_TE.dtype).reshape(spec.sequences, 1, num_experts)
    grad_probs_TE = grad_probs_BE.expand(shape_of_sums(logits, spec)).reshape(logits.shape)
    softmax_TE = probs_TE
    if spec.score in ("sigmoid", "sqrt_softplus"):
        softmax_TE = logits_TE.softmax(-1)
        scores_TE = router_scores(logits_TE, spec.score)
        mean_T1 = (grad_probs_TE * probs_TE).sum(-1, keepdim=True)
        grad_scores_TE = (grad_probs_TE - mean_T1) / (scores_TE.sum(-1, keepdim=True) + EPS)
        grad_scores_TE = grad_scores_TE.scatter_add(1, ids_TK, grad_raw_TK)
        if spec.score == "sigmoid":
            slope_TE = scores_TE * (1 - scores_TE)
        else:  # sigmoid(l) / (2 s), which far below is s / 2
            slope_TE = torch.where(logits_TE < -40, scores_TE / 2, logits_TE.sigmoid() / (2 * scores_TE))
        grad_TE = grad_scores_TE * slope_TE
    elif spec.score == "topk_softmax":
        grad_TE = _softmax_backward(grad_probs_TE, softmax_TE)
        grad_TE = grad_TE.scatter_add(1, ids_TK, _softmax_backward(grad_raw_TK, raw_TK))
    else:
        grad_TE = _softmax_backward(grad_probs_TE.scatter_add(1, ids_TK, grad_raw_TK), softmax_TE)
    # d logsumexp(l)**2 / dl = 2 * logsumexp(l) * softmax(l)
    grad_TE = grad_TE + 2 * grad_z_sum.to(logits_TE.dtype) * logits_TE.logsumexp(-1, keepdim=True) * softmax_TE
    return grad_TE.masked_fill((experts == -1).all(-1, keepdim=True), 0.0).to(logits.dtype)


def _softmax_backward(grad: Tensor, probs: Tensor) -> Tensor:
    return probs * (grad - (grad * probs).sum(-1, keepdim=True))
