"""Auxiliary losses of the router, computed from sums over tokens that the caller may all-reduce first."""

from __future__ import annotations

from torch import Tensor


def load_balance_loss(
    counts: Tensor, score_sums: Tensor, num_tokens: Tensor, top_k: int, *, per_sequence: bool = False
) -> Tensor:
    """Compute E / K * sum_e (counts_e / N) * (score_sums_e / N), a scalar; 1 when load and scores are uniform.

    counts [E]: assignments wanted before dropping, a constant to autograd. score_sums [E]: sums over tokens of the
    router's normalised scores. num_tokens []: N, the tokens that count. For K = 1 this is Switch Transformer's loss
    (arXiv 2101.03961, eq. 4); for K > 1 the counts are over all K choices, as in Mixtral's and DeepSeek's.

    per_sequence: counts [B, E], score_sums [B, E] and num_tokens [B] are those of each sequence (`Routing.sequences`),
    and the loss is the mean of theirs over the sequences that have tokens (DeepSeek-V3, arXiv 2412.19437, eq. 17-20).
    """
    total = num_tokens.clamp_min(1)[..., None]
    load = counts.to(score_sums.dtype) / total
    loss = counts.shape[-1] / top_k * (load * (score_sums / total)).sum(-1)
    return loss.sum() / (num_tokens > 0).sum().clamp_min(1) if per_sequence else loss


def z_loss(z_sum: Tensor, num_tokens: Tensor) -> Tensor:
    """Return the mean over tokens of logsumexp(logits)**2 (ST-MoE, arXiv 2202.08906, eq. 5): keeps the logits small."""
    return z_sum / num_tokens.clamp_min(1)
