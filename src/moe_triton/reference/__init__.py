"""The definition of every operation, in plain PyTorch and einops: read this first.

Nothing here is fast. Everything runs in float64 and is differentiated by autograd, so a backend is right when it
agrees with this page. Shapes: T tokens, d hidden size, n intermediate size, E experts, K choices, S = T*K assignments.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from moe_triton.quantization import QuantizedWeight
from moe_triton.records import (
    EMPTY,
    UNGATED,
    Dispatch,
    ExpertCall,
    ExpertSpec,
    ExpertWeight,
    Lora,
    Projection,
    RouterSpec,
    Routing,
    SequenceSums,
    TiledDispatch,
)
from moe_triton.torch_internals import by_full_vectors, record

EPS = 1e-20  # keeps a normalisation finite when every chosen score underflowed


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of router maths: fp32, or the model's own where that is wider."""
    return dtype if dtype == torch.float64 else torch.float32


def gate(hidden_Td: Tensor, weight_Ed: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """Score every expert for every token: logits [T, E] = hidden W^T + b in fp32 (fp64 for an fp64 weight)."""
    dtype = wide(weight_Ed.dtype)
    return F.linear(hidden_Td.to(dtype), weight_Ed.to(dtype), None if bias_E is None else bias_E.to(dtype))


def sqrt_softplus(x: Tensor) -> Tensor:
    """Return sqrt(log(1 + exp(x))) (DeepSeek-V4); below -40 as exp(x/2), which it equals in float64."""
    return torch.where(x < -40, (x / 2).exp(), F.softplus(x.clamp_min(-40), threshold=50).sqrt())


def router_scores(logits_TE: Tensor, score: str) -> Tensor:
    """Return every expert's score [T, E], of which the chosen ones' are the weights; "topk_softmax" has softmax's."""
    if score == "sigmoid":
        return by_full_vectors(torch.sigmoid, logits_TE)
    return by_full_vectors(sqrt_softplus, logits_TE) if score == "sqrt_softplus" else logits_TE.softmax(-1)


def group_mask(scores_TE: Tensor, spec: RouterSpec) -> Tensor:
    """Return True [T, E] for the experts of each token's best groups (DeepSeek-V2: max, V3: sum of the top 2)."""
    scores_TGM = rearrange(scores_TE, "t (g m) -> t g m", g=spec.num_groups)
    if spec.group_score == "max":
        group_TG = scores_TGM.amax(-1)
    else:
        group_TG = scores_TGM.topk(min(2, scores_TGM.shape[-1]), dim=-1).values.sum(-1)
    best_TG = group_TG.sort(dim=-1, descending=True, stable=True).indices[:, : spec.top_groups]
    kept_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter(1, best_TG, True)
    return rearrange(kept_TG[:, :, None].expand_as(scores_TGM), "t g m -> t (g m)")


def choice_keys(
    logits_TE: Tensor,
    spec: RouterSpec,
    choice_bias: Tensor | None,
    noise: Tensor | None,
) -> Tensor:
    """Return what the top-k is taken of, [T, E]: higher wins, the lower index wins a tie, NaN counts as -inf.

    A score is monotone in its logit, so the logits themselves are compared, which no rounding of exp can disturb.
    Only a choice bias, or a sum of two scores over a group, needs the scores.
    """
    keys_TE = logits_TE if noise is None else logits_TE + noise
    if choice_bias is not None or (spec.num_groups > 1 and spec.group_score == "top2_sum"):
        if spec.score != "topk_softmax":
            keys_TE = router_scores(keys_TE, spec.score)
        if choice_bias is not None:
            keys_TE = keys_TE + choice_bias.to(keys_TE.dtype)
    keys_TE = keys_TE.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    if spec.num_groups > 1:
        keys_TE = keys_TE.masked_fill(~group_mask(keys_TE, spec), float("-inf"))
    return keys_TE


def given_choices(experts_TK: Tensor, num_experts: int) -> Tensor:
    """Return given ids [T, K] as int32, `EMPTY` as it is: -1 for any other one outside [0, E), and for one that its row
    has before."""
    ids = experts_TK.long()
    is_repeated = (ids[:, :, None] == ids[:, None, :]).tril(-1).any(-1)
    is_unknown = (ids < 0) | (ids >= num_experts)
    return ids.masked_fill((is_repeated | is_unknown) & (ids != EMPTY), -1).int()


def unless_empty(given_TK: Tensor, experts_TK: Tensor) -> Tensor:
    """Return the given choices [T, K] in place of a token's own, in the rows that have any."""
    return torch.where((given_TK != -1).any(-1, keepdim=True), given_TK.to(experts_TK.dtype), experts_TK)


def normalised_and_chosen(
    logits_TE: Tensor, experts_TK: Tensor, spec: RouterSpec, *, all_real: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the scores divided by each token's sum [T, E], and the weights [T, K] before `normalize` and `scale`.

    The weights are 0 where there is no expert, and for the last `spec.weightless` experts. `all_real` says that none of
    the choices is such a one, so that nothing need be masked.
    """
    scores_TE = router_scores(logits_TE, spec.score)
    has_none_TK = None
    ids_TK = experts_TK
    if not all_real:
        has_none_TK = (experts_TK < 0) | (experts_TK >= logits_TE.shape[1] - spec.weightless)
        ids_TK = experts_TK.masked_fill(has_none_TK, 0)
    if spec.score == "topk_softmax":
        chosen_TK = logits_TE.gather(1, ids_TK)
        if has_none_TK is not None:
            chosen_TK = chosen_TK.masked_fill(has_none_TK, float("-inf"))
            chosen_TK = chosen_TK.masked_fill(has_none_TK.all(-1, keepdim=True), 0.0)
        chosen_TK = chosen_TK.softmax(-1)
    else:
        chosen_TK = scores_TE.gather(1, ids_TK)
    if spec.score in ("sigmoid", "sqrt_softplus"):
        scores_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + EPS)
    return scores_TE, chosen_TK if has_none_TK is None else chosen_TK.masked_fill(has_none_TK, 0.0)


def route(
    logits_TE: Tensor,
    spec: RouterSpec,
    *,
    choice_bias: Tensor | None = None,
    noise: Tensor | None = None,
    token_mask: Tensor | None = None,
    given: Tensor | None = None,
) -> Routing:
    """Choose each token's K distinct experts by its logits [T, E], in order of preference; sum up what losses need.

    score "softmax": s = softmax(logits), w = s[chosen] (Switch, Mixtral); "sigmoid": s = sigmoid(logits) (DeepSeek-V3);
    "sqrt_softplus": s = sqrt(softplus(logits)) (DeepSeek-V4); "topk_softmax": w = softmax(logits[chosen]) (gpt-oss).
    The last `weightless` experts have w = 0 (null experts). `normalize` divides w by its sum, then `scale` multiplies.
    `choice_bias` [E] and `noise` [T, E] change which experts are chosen, never a weight. `given` [T, K] takes the place
    of the choice, in its order (router replay, arXiv 2510.11370): weights, sums and gradients are those of the present
    logits. A given id that `given_choices` refuses is skipped; a row without any other is chosen as if none were given.
    """
    num_tokens, num_experts = logits_TE.shape
    logits = logits_TE.to(wide(logits_TE.dtype))
    valid = torch.ones(num_tokens, dtype=torch.bool, device=logits.device)
    if token_mask is not None:
        valid = token_mask.bool()
        logits = logits.masked_fill(~valid[:, None], 0.0)  # a NaN that counts nowhere gives no NaN in a gradient
    keys = choice_keys(logits.detach(), spec, choice_bias, noise)
    experts = keys.sort(dim=-1, descending=True, stable=True).indices[:, : spec.top_k]
    if given is not None:
        experts = unless_empty(given_choices(given, num_experts), experts)

    probs, weights = normalised_and_chosen(logits, experts, spec)
    if spec.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + EPS)
    weights = weights * spec.scale
    z = logits.logsumexp(-1).square()

    if token_mask is not None:
        experts = experts.masked_fill(~valid[:, None], -1)
        weights = weights.masked_fill(~valid[:, None], 0.0)
        probs = probs.masked_fill(~valid[:, None], 0.0)
        z = z.masked_fill(~valid, 0.0)
    lengths = [num_tokens // spec.sequences] * spec.sequences
    counts = [torch.bincount(ids[ids >= 0], minlength=num_experts).int() for ids in experts.split(lengths)]
    score_sums = [part.sum(0) for part in probs.split(lengths)]
    num_valid = valid.view(spec.sequences, -1).sum(1).to(logits.dtype)
    if spec.sequences == 1:
        return routing_of(experts.int(), weights, counts[0], score_sums[0], z.sum(), num_valid[0])
    return routing_of(experts.int(), weights, torch.stack(counts), torch.stack(score_sums), z.sum(), num_valid)


def routing_of(
    experts: Tensor,
    weights: Tensor,
    counts: Tensor,
    score_sums: Tensor,
    z_sum: Tensor,
    num_tokens: Tensor,
    hidden: Tensor | None = None,
    dispatched: TiledDispatch | None = None,
) -> Routing:
    """Return the record of counts and score sums [E], and of the number of tokens []; or of [B, E] and [B]."""
    sequences = None
    if counts.dim() == 2:
        sequences = SequenceSums(counts, score_sums, num_tokens)
        counts, score_sums, num_tokens = counts.sum(0, dtype=counts.dtype), score_sums.sum(0), num_tokens.sum()
    return record(
        Routing,
        experts=experts,
        weights=weights,
        counts=counts,
        score_sums=score_sums,
        z_sum=z_sum,
        num_tokens=num_tokens,
        sequences=sequences,
        hidden=hidden,
        dispatched=dispatched,
    )


def dispatch(
    experts_TK: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    capacity_groups: int = 1,
    by_choice: bool = False,
    keys: Tensor | None = None,
) -> Dispatch:
    """Give every kept assignment of the choices [T, K] its row. Ids outside [0, E) are skipped.

    Rows lie in expert order and, within an expert, in order of token*K + choice. With a `capacity`, each expert keeps
    at most that many assignments out of each of the `capacity_groups` equal runs of consecutive tokens: those with the
    highest `keys` [T, K] if given; else, with `by_choice`, all first choices before all second ones; then the earliest.
    """
    num_tokens, top_k = experts_TK.shape
    num_slots = num_tokens * top_k
    expert = experts_TK.reshape(-1).long()
    slot = torch.arange(num_slots, device=expert.device)
    valid = (expert >= 0) & (expert < num_experts)
    bucket = torch.where(valid, expert, num_experts)
    counts = torch.bincount(bucket, minlength=num_experts + 1)[:num_experts]

    keep = valid
    if capacity is not None and num_slots > 0:
        group = slot // (num_slots // capacity_groups)
        order = slot  # the most important assignment first
        if keys is not None:
            order = keys.reshape(-1).sort(descending=True, stable=True).indices
        elif by_choice:
            order = rearrange(slot.view(num_tokens, top_k), "t k -> (k t)")
        queue = (group * (num_experts + 1) + bucket)[order]  # one queue per (group, expert)
        sorted_queue, by_queue = queue.sort(stable=True)
        first = torch.searchsorted(sorted_queue, sorted_queue)
        rank = torch.empty_like(slot)
        rank[order[by_queue]] = slot - first
        keep = valid & (rank < capacity)

    kept_bucket = torch.where(keep, expert, num_experts)
    kept_counts = torch.bincount(kept_bucket, minlength=num_experts + 1)[:num_experts]
    offsets = F.pad(kept_counts.cumsum(0), (1, 0))
    rows = kept_bucket.sort(stable=True).indices  # row -> slot; the ones not kept come last
    position = torch.empty_like(slot)
    position[rows] = slot
    source = torch.where(slot < offsets[-1], rows, -1)
    position = torch.where(keep, position, -1)
    return Dispatch(
        counts=counts.int(),
        offsets=offsets.int(),
        source=source.int(),
        position=position.view(num_tokens, top_k).int(),
    )


def renormalize(weights_TK: Tensor, dispatch: Dispatch) -> Tensor:
    """Divide weights [T, K] by their sum over each token's surviving choices; 0 at the dropped ones (GShard)."""
    kept = torch.where(dispatch.position >= 0, weights_TK, 0.0)
    return kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(kept.dtype).eps)


def activate(
    hidden: Tensor,
    activation: str,
    is_concatenated: bool = True,
    limit: float | None = None,
    alpha: float | None = None,
) -> Tensor:
    """Activate [..., 2n] -> [..., n] where gated (gate first, then up), [..., n] -> [..., n] where not.

    With a limit L, gate becomes min(gate, L) and up min(max(up, -L), L) first; the slope at a limit itself is 1.
    "swiglu" is gate * sigmoid(alpha * gate) * up (DeepSeek-V4: L = 10, alpha = 1), "gpt_oss" the same with up + 1
    (gpt-oss and MiniMax-M3: L = 7, alpha = 1.702). None is the activation's own limit or alpha, as in `ExpertSpec`.
    """
    if activation in UNGATED:
        return pointwise(hidden, activation)
    pattern = "... (two n) -> two ... n" if is_concatenated else "... (n two) -> two ... n"
    gate, up = rearrange(hidden, pattern, two=2)
    spec = ExpertSpec(activation=activation, activation_limit=limit, activation_alpha=alpha)
    limit, alpha = spec.limit, spec.alpha
    if limit is not None:
        # no clamp: its gradient at the limit itself, 1 here, became 0 in torch 2.14
        gate = torch.where(gate > limit, limit, gate)
        up = torch.where(up.abs() > limit, limit * up.sign(), up)
    if activation == "gpt_oss":
        return (up + 1) * gate * torch.sigmoid(alpha * gate)
    if alpha != 1:
        return gate * torch.sigmoid(alpha * gate) * up
    gates = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
    return pointwise(gate, gates[activation]) * up


def pointwise(x: Tensor, name: str) -> Tensor:
    """Apply an ungated activation: silu, gelu (erf), gelu_tanh, relu, relu2 (relu squared, Primer).

    The two forms of GELU (arXiv 1606.08415) are written without 1 + erf and 1 + tanh, of which nothing is left for far
    negative x even in float64.
    """
    if name == "silu":
        return F.silu(x)
    if name == "gelu":  # x (1 + erf(x / sqrt 2)) / 2
        return x * torch.erfc(x * -math.sqrt(0.5)) / 2
    if name == "gelu_tanh":  # x (1 + tanh y) / 2
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return F.relu(x) if name == "relu" else F.relu(x).square()


def adapted(product: Tensor, x: Tensor, lora: Lora | None, expert: int) -> Tensor:
    """Return x W^T + scaling * (x A^T) B^T, given x W^T, [rows, out]: what LoRA makes of it (arXiv 2106.09685)."""
    return product if lora is None else product + lora.scaling * (x @ lora.a[expert].T) @ lora.b[expert].T


def dequantized(projection: Projection, dtype: torch.dtype) -> ExpertWeight:
    """Return a projection as it is, or the numbers that a quantised one stands for."""
    return projection.dequantize(dtype) if isinstance(projection, QuantizedWeight) else projection


def moe_experts(call: ExpertCall) -> Tensor:
    """Compute out[t] = sum over t's kept choices k of weights[t, k] * (W2 act(W1 x[t] + b1) + b2), [T, d].

    With adapters W1 and W2 are W + scaling * B A, which is never formed: see `adapted`.
    """
    hidden_Td, spec, dispatched = call.hidden, call.spec, call.dispatched
    gate_up, down = (dequantized(p, hidden_Td.dtype) for p in call.parameters[:2])
    gate_up_bias, down_bias = call.parameters[2:4]
    out = torch.zeros_like(hidden_Td)
    offsets = dispatched.offsets.tolist()
    for e in range(dispatched.num_experts):
        slots = dispatched.source[offsets[e] : offsets[e + 1]].long()
        tokens = slots // dispatched.top_k
        up_of_e, down_of_e = gate_up[e], down[e]
        if spec.is_transposed:
            up_of_e, down_of_e = up_of_e.T, down_of_e.T
        x = hidden_Td[tokens]
        h = adapted(x @ up_of_e.T, x, call.gate_up_lora, e)
        if gate_up_bias is not None:
            h = h + gate_up_bias[e]
        a = activate(h, spec.activation, spec.is_concatenated, spec.limit, spec.alpha)
        rows = adapted(a @ down_of_e.T, a, call.down_lora, e)
        if down_bias is not None:
            rows = rows + down_bias[e]
        scaled = rows * call.weights.reshape(-1)[slots, None]
        out = out.index_add(0, tokens, scaled.to(out.dtype))
    return out
