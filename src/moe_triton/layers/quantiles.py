"""Quantile balancing: the choice bias from a histogram of the biases that tokens would have needed (Kimi K3).

Definition: `reference.choices.quantile_bias`. A histogram can be summed over the batches of a step and over ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_triton.records import RouterSpec

QUANTILE_BINS = 1000  # of each expert, as in Kimi K3's report, appendix D
BOUNDED_SCORES = ("softmax", "sigmoid")


def check_quantile_update(spec: RouterSpec, num_experts: int, choice_bias: bool) -> None:
    """ValueError where the histogram's range, one beyond the bias on both sides, does not hold all needed biases."""
    if not choice_bias:
        raise ValueError("bias_update: got 'quantile' with choice_bias=False, wanted choice_bias=True")
    if spec.score not in BOUNDED_SCORES:
        raise ValueError(f"score: got {spec.score!r} with bias_update='quantile', wanted softmax or sigmoid")
    if spec.num_groups > 1:
        raise ValueError(f"num_groups: got {spec.num_groups} with bias_update='quantile', wanted 1")
    if spec.top_k == num_experts:
        raise ValueError(f"top_k: got {spec.top_k} with bias_update='quantile', wanted fewer than the {num_experts}")


def bounds(choice_bias: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest edge [] and the width [] of the bins; scores lie in [0, 1]."""
    low = choice_bias.min() - 1
    return low, (choice_bias.max() + 1 - low) / QUANTILE_BINS


def required_biases(scores: Tensor, choice_bias: Tensor, top_k: int, token_mask: Tensor | None) -> Tensor:
    """Count, by expert and bin [E, bins] int64, the bias with which each token would have chosen each expert.

    scores [T, E]; tokens where token_mask [T] is false do not count. The memory is that of T * E ids of 8 bytes.
    """
    num_experts = scores.shape[1]
    scores = scores.nan_to_num(nan=0.0)
    low, width = bounds(choice_bias)
    cutoff = (scores + choice_bias).topk(top_k + 1, dim=-1, sorted=True).values[:, -1:]
    place = ((cutoff - scores - low) / width).floor().long().clamp(0, QUANTILE_BINS - 1)
    place += QUANTILE_BINS * torch.arange(num_experts, device=scores.device)
    ones = torch.ones_like(place) if token_mask is None else token_mask[:, None].expand_as(place).long()
    counts = torch.zeros(num_experts * QUANTILE_BINS, dtype=torch.int64, device=scores.device)
    return counts.scatter_add(0, place.flatten(), ones.flatten()).view(num_experts, QUANTILE_BINS)


def bias_of_histogram(histogram: Tensor, choice_bias: Tensor, top_k: int) -> Tensor:
    """Return the quantiles at K / E of a histogram [E, bins] made with this bias, less their mean: [E] fp32.

    The bias as it is where nothing was counted.
    """
    num_experts = histogram.shape[0]
    low, width = bounds(choice_bias)
    below = histogram.cumsum(1).double()
    wanted = below[:, -1:] * (top_k / num_experts)
    place = torch.searchsorted(below, wanted).clamp_max(QUANTILE_BINS - 1)
    inside = histogram.gather(1, place).double()
    part = (wanted - (below.gather(1, place) - inside)) / inside.clamp_min(1)
    bias = (low + width * (place + part)).squeeze(1)
    return torch.where(below[:, -1] > 0, bias - bias.mean(), choice_bias).float()
