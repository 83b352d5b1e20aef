"""The backward of top-k routing: the gradient of the logits, with the scores recomputed. Shapes as in `routing`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.arithmetic import cdiv
from moe_triton_kernels.launch import constants
from moe_triton_kernels.scores import (
    EPS,
    SIGMOID,
    SOFTMAX,
    TOPK_SOFTMAX,
    own_score,
    scores_of_chosen,
    sigmoid,
    softmax_rows,
)
from moe_triton_kernels.topk_options import NUM_WARPS, TopK, lanes_of, rule_of


@triton.jit(do_not_specialize=["num_tokens", "sequence_length"])
def topk_backward_kernel(
    grad_weights,  # [T, K]
    grad_score_sums,  # [B, E]
    grad_z_sum,  # []
    logits,  # [T, E]
    experts,  # [T, K]
    grad_logits,  # [T, E]
    num_tokens,
    sequence_length,  # T / B
    scale,
    RULE,
    LANES,
):
    """The gradient of the logits, with the scores recomputed. u are the chosen scores, w = scale * u / sum(u)."""
    NUM_EXPERTS: tl.constexpr = RULE.NUM_EXPERTS
    BLOCK_T: tl.constexpr = LANES.BLOCK_T
    BLOCK_E: tl.constexpr = LANES.GROUPS * LANES.MEMBERS
    BLOCK_K: tl.constexpr = LANES.BLOCK_K
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    exists = token < num_tokens
    expert = tl.arange(0, BLOCK_E)[None, :]
    choice_k = tl.arange(0, BLOCK_K)[None, :]
    cells = token[:, None] * NUM_EXPERTS + expert
    present = exists[:, None] & (expert < NUM_EXPERTS)
    slots = token[:, None] * RULE.TOP_K + choice_k
    chosen = tl.load(experts + slots, mask=exists[:, None] & (choice_k < RULE.TOP_K), other=-1)
    has_weight = (chosen >= 0) & (chosen < NUM_EXPERTS - RULE.WEIGHTLESS)
    valid = tl.max((chosen != -1).to(tl.int32), 1) != 0
    x = tl.load(logits + cells, mask=present & valid[:, None], other=float("-inf")).to(tl.float32)
    softmax, lse = softmax_rows(x, valid)

    # gradients of u, [T, K]
    logit = tl.load(logits + token[:, None] * NUM_EXPERTS + chosen, mask=has_weight, other=float("-inf"))
    logit = logit.to(tl.float32)
    grad_u = tl.load(grad_weights + slots, mask=has_weight, other=0.0).to(tl.float32) * scale
    u = scores_of_chosen(logit, lse, has_weight, RULE.SCORE)
    if RULE.NORMALIZE:
        total = tl.sum(u, 1)[:, None] + EPS
        grad_u = (grad_u - tl.sum(grad_u * u, 1)[:, None] / total) / total
    if RULE.SCORE == TOPK_SOFTMAX:
        grad_chosen = u * (grad_u - tl.sum(grad_u * u, 1)[:, None])  # of the chosen logits
    else:
        grad_chosen = grad_u  # of the chosen scores
    scattered = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for k in range(RULE.TOP_K):
        index = tl.sum(tl.where(choice_k == k, chosen, 0), 1)
        value = tl.sum(tl.where((choice_k == k) & has_weight, grad_chosen, 0.0), 1)
        scattered += tl.where(expert == index[:, None], value[:, None], 0.0)

    # through the scores
    sums = (token // sequence_length)[:, None] * NUM_EXPERTS + expert
    grad_probs = tl.load(grad_score_sums + sums, mask=present, other=0.0).to(tl.float32)
    if RULE.SCORE >= SIGMOID:
        s = own_score(x, RULE.SCORE)
        total = tl.sum(s, 1)[:, None] + EPS
        scattered += (grad_probs - tl.sum(grad_probs * s, 1)[:, None] / total) / total
        if RULE.SCORE == SIGMOID:
            slope = s * (1.0 - s)
        else:  # sigmoid(x) / (2 s), which far below is s / 2
            slope = tl.where(x < -40.0, 0.5 * s, sigmoid(x) / (2.0 * s))
        grad = slope * scattered
    elif RULE.SCORE == SOFTMAX:
        grad_probs += scattered
        grad = softmax * (grad_probs - tl.sum(softmax * grad_probs, 1)[:, None])
    else:
        grad = scattered + softmax * (grad_probs - tl.sum(softmax * grad_probs, 1)[:, None])
    grad += 2.0 * tl.load(grad_z_sum).to(tl.float32) * lse[:, None] * softmax
    tl.store(grad_logits + cells, grad, mask=present)


def topk_backward(
    grad_weights: Tensor, grad_score_sums: Tensor, grad_z_sum: Tensor, logits: Tensor, experts: Tensor, options: TopK
) -> Tensor:
    """Gradient of the logits [T, E], in their dtype; zeros for the tokens whose experts [T, K] are -1. One launch.

    grad_score_sums: [E], or [B, E] with several sequences.
    """
    num_tokens, num_experts = logits.shape
    grad_logits = torch.empty((num_tokens, num_experts), dtype=logits.dtype, device=logits.device)
    if num_tokens == 0:
        return grad_logits
    lanes = lanes_of(num_experts, options.top_k)
    topk_backward_kernel[(cdiv(num_tokens, lanes.BLOCK_T),)](
        grad_weights.contiguous(),
        grad_score_sums.contiguous(),
        grad_z_sum,
        logits.contiguous(),
        experts.contiguous(),
        grad_logits,
        num_tokens,
        num_tokens // options.sequences,
        float(options.scale),
        RULE=constants(rule_of(num_experts, options)),
        LANES=constants(lanes),
        num_warps=NUM_WARPS,
    )
    return grad_logits
