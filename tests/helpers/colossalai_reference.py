"""Colossal-AI's routers as their formulas say, on dense masks, and the parity facts' logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

L = torch.tensor([[2.0, 1.0, 0.0], [2.0, 0.0, 1.0], [3.0, 0.0, 0.0], [0.0, 2.0, 1.0]])


def capacity(generation: str, num_tokens: int, num_experts: int, top_k: int, factor: float, min_capacity: int) -> int:
    if generation == "v0.0.2":
        return max(math.ceil(top_k * factor * num_tokens / num_experts - 1e-9), min_capacity)
    places = math.floor(factor * num_tokens / num_experts + 1e-9)
    return max(places + places % 2, min_capacity)


def combine_weights(logits: Tensor, top_k: int, places: int) -> tuple[Tensor, Tensor]:
    """(weights [S, E], zero where dropped or not chosen; aux loss), keeping the earliest first choices first."""
    probs = F.softmax(logits.double(), dim=-1)
    num_experts = probs.shape[1]
    masks, left = [], probs.clone()
    for _ in range(top_k):
        mask = F.one_hot(left.argmax(-1), num_experts)
        left = left.masked_fill(mask.bool(), float("-inf"))
        masks.append(mask)
    aux = num_experts * (probs.mean(0) * sum(masks).double().mean(0)).sum() / top_k
    before, kept = torch.zeros(num_experts, dtype=torch.long), torch.zeros_like(probs)
    for mask in masks:
        slots = mask.cumsum(0) - 1 + before
        kept += mask * (slots < places) * probs
        before = before + mask.sum(0)
    return kept, aux


def as_dense(experts: Tensor, weights: Tensor, position: Tensor, num_experts: int) -> Tensor:
    """What a router of ours decided, as weights [S, E]."""
    dense = torch.zeros(experts.shape[0], num_experts, dtype=torch.float64)
    return dense.scatter(1, experts.long(), torch.where(position >= 0, weights, 0).double())
