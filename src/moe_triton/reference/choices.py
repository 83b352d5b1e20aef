"""The definition of the rules that choose experts in another way than by the top-k of a token's logits alone.

Shapes: G groups of tokens that are a batch each, T tokens of a group, E experts, K choices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton.records import EMPTY


def expert_choice(scores_GTE: Tensor, capacity: int, top_k: int) -> Tensor:
    """Return the experts [G, T, K] of every token when each expert takes its `capacity` best tokens of each group.

    Expert choice (Zhou et al., arXiv 2202.09368): expert e takes the tokens of the `capacity` highest scores in column
    e. A token keeps the `top_k` best of those that took it, in order of its scores (K = E keeps all, as the paper
    does); the other places are `EMPTY`. A score of -inf is not taken.
    """
    order = scores_GTE.sort(dim=1, descending=True, stable=True).indices[:, :capacity]
    taken = torch.zeros_like(scores_GTE, dtype=torch.bool).scatter(1, order, True) & (scores_GTE > float("-inf"))
    own = scores_GTE.masked_fill(~taken, float("-inf")).sort(dim=-1, descending=True, stable=True)
    ids = own.indices[..., :top_k]
    return ids.masked_fill(~taken.gather(-1, ids), EMPTY).int()


def sinkhorn_offsets(logits_GTE: Tensor, iterations: int) -> Tensor:
    """Return what Sinkhorn's algorithm adds to each expert's logits in a group, [G, 1, E].

    The algorithm scales rows and columns of exp(logits) in turn until each token's row sums to 1/T and each expert's
    column to 1/E (Megatron-Core's "sinkhorn"; S-BASE, arXiv 2202.01169): P = exp(logits + row + column). Within a row,
    the best experts by P are those by logits + column. In logarithms, where no logit overflows; a row of -inf, as of
    a token that counts nowhere, takes no part.
    """
    limit = torch.finfo(logits_GTE.dtype).max / 4
    logits_GTE = logits_GTE.nan_to_num(nan=float("-inf"), posinf=limit, neginf=float("-inf"))
    is_out = (logits_GTE == float("-inf")).all(-1, keepdim=True)
    column = torch.zeros_like(logits_GTE[:, :1])
    for _ in range(iterations):
        row = -(logits_GTE + column).logsumexp(-1, keepdim=True)
        column = -(logits_GTE + row.masked_fill(is_out, 0.0)).logsumexp(1, keepdim=True)
        column = column.masked_fill(column == float("inf"), 0.0)  # no token has a logit for this expert
    return column


def top_p_choices(scores_TK: Tensor, experts_TK: Tensor, top_p: float) -> Tensor:
    """Return the choices [T, K], best first, with those `EMPTY` that a mass of `top_p` is reached without.

    Dynamic routing (Huang et al., arXiv 2403.07652): the smallest k with s_1 + ... + s_k >= top_p, at most K.
    """
    top_k = scores_TK.shape[1]
    is_before = torch.ones(top_k, top_k, dtype=scores_TK.dtype, device=scores_TK.device).tril(-1)
    before_TK = (scores_TK[:, None, :] * is_before).sum(-1)  # no cumsum, which has no fixed order on a GPU
    return experts_TK.masked_fill((before_TK >= top_p) & (experts_TK >= 0), EMPTY)


def ranks_in_queues(queue_N: Tensor, order_N: Tensor, is_in_N: Tensor, num_queues: int) -> Tensor:
    """Return how many of those that are in stand before each one in its queue; `order` sorts all by their queues."""
    sorted_queue = queue_N[order_N]
    first = torch.searchsorted(sorted_queue, torch.arange(num_queues, device=queue_N.device))
    before = F.pad(is_in_N[order_N].long().cumsum(0), (1, 0))
    rank = torch.zeros_like(queue_N)
    rank[order_N] = before[:-1] - before[first[sorted_queue]]
    return rank


def token_rounding(
    scores_GTJ: Tensor, experts_GTJ: Tensor, num_experts: int, top_k: int, tile: int, extra: int, rounds: int = 8
) -> Tensor:
    """Return choices [G, T, K + extra] of which every expert has a multiple of `tile` in each group, or `EMPTY`.

    Token rounding (SonicMoE, arXiv 2512.14080). The first K of a token's J experts, best first, are its choices. Each
    expert's number of choices is rounded to the nearest multiple, a half to the even one. Rounded down, it drops its
    choices of the lowest scores. Rounded up, it takes the tokens of the highest scores among those that it is a later
    expert of. A token takes `extra` more experts at most, those that it scores highest; an expert that was refused
    asks its next best token, `rounds` times. One that is then still short is rounded down. With J = E and extra = E - K
    nothing is refused, which is the paper's rule.
    """
    num_groups, num_tokens, width = experts_GTJ.shape
    queues = num_groups * num_experts + 1  # the last one takes the tokens that do not count
    group = torch.arange(num_groups, device=experts_GTJ.device)[:, None, None]
    queue = torch.where(experts_GTJ >= 0, experts_GTJ.long() + num_experts * group, queues - 1)
    own, later = (part.reshape(-1) for part in queue.split([top_k, width - top_k], -1))
    own_scores, later_scores = (part.reshape(-1) for part in scores_GTJ.split([top_k, width - top_k], -1))

    def by_queue(queue_N: Tensor, scores_N: Tensor) -> Tensor:
        best_first = scores_N.sort(descending=True, stable=True).indices
        return best_first[queue_N[best_first].sort(stable=True).indices]

    def sizes(queue_N: Tensor, is_in_N: Tensor) -> Tensor:
        zeros = torch.zeros(queues, dtype=torch.int64, device=queue_N.device)
        return zeros.scatter_add(0, queue_N, is_in_N.long())

    counts = sizes(own, torch.ones_like(own))
    low, over = counts // tile * tile, counts % tile
    goes_up = (2 * over > tile) | ((2 * over == tile) & (low // tile % 2 == 1))
    goes_up[-1] = False
    wanted = torch.where(goes_up, tile - over, 0)

    asked_by, order = torch.ones_like(later, dtype=torch.bool), by_queue(later, later_scores)
    taken = torch.zeros_like(asked_by)
    for _ in range(rounds):
        asks = asked_by & (ranks_in_queues(later, order, asked_by, queues) < wanted[later])
        by_token = asks.view(num_groups, num_tokens, width - top_k).long()
        taken = asks & ((by_token.cumsum(-1) - by_token).reshape(-1) < extra)
        asked_by = asked_by & ~(asks & ~taken)
    is_full = goes_up & (sizes(later, taken) == wanted)
    taken = (taken & is_full[later]).view(num_groups, num_tokens, width - top_k)

    kept = ranks_in_queues(own, by_queue(own, own_scores), torch.ones_like(own), queues)
    kept = (kept < torch.where(is_full, counts, low)[own]).view(num_groups, num_tokens, top_k)
    chosen, others = experts_GTJ.split([top_k, width - top_k], -1)
    place = torch.where(taken, taken.long().cumsum(-1) - 1, extra)
    more = torch.full((num_groups, num_tokens, extra + 1), EMPTY, dtype=chosen.dtype, device=chosen.device)
    more = more.scatter(-1, place, others)[..., :extra]
    return torch.cat([chosen.masked_fill(~kept & (chosen >= 0), EMPTY), more], -1)


def quantile_bias(scores_TE: Tensor, choice_bias: Tensor, top_k: int) -> Tensor:
    """Return the choice bias [E] under which every expert would have been chosen by K / E of these tokens.

    Quantile balancing (Kimi K3's report, section 2.3.3; Su, kexue.fm/archives/11619): with a the (K+1)-th highest of a
    token's biased scores, expert e is chosen where s_e + b_e > a. So b_e = quantile over tokens of (a - s_e) at K / E,
    and the mean over experts is subtracted.
    """
    cutoff_T1 = (scores_TE + choice_bias).topk(top_k + 1, dim=-1).values[:, -1:]
    bias = (cutoff_T1 - scores_TE).quantile(top_k / scores_TE.shape[1], dim=0)
    return bias - bias.mean()
