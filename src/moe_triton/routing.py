"""Routing: logits -> each token's experts and weights. Validation and the choice of backend.

Definition: `moe_triton.reference.route`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from moe_triton import reference, runtime
from moe_triton.autograd.routing import run_inference, run_route
from moe_triton.checks import FLOATS, INTEGERS, MASKS, check_choice, check_int, check_number, check_tensor
from moe_triton.records import GROUP_SCORES, SCORES, RouterSpec, Routing


def router_spec(
    num_experts: int,
    top_k: int,
    *,
    score: str = "softmax",
    normalize: bool | None = None,
    scale: float = 1.0,
    num_groups: int = 1,
    top_groups: int | None = None,
    group_score: str = "max",
    weightless: int = 0,
) -> RouterSpec:
    """Return the checked record of a router's options; see `route` for their meaning."""
    check_int("num_experts", num_experts, low=1)
    check_int("top_k", top_k, low=1, high=num_experts)
    check_choice("score", score, SCORES)
    check_number("scale", scale)
    check_int("num_groups", num_groups, low=1, high=num_experts)
    if num_experts % num_groups:
        raise ValueError(f"num_groups: got {num_groups}, wanted a divisor of num_experts={num_experts}")
    top_groups = num_groups if top_groups is None else top_groups
    check_int("top_groups", top_groups, low=1, high=num_groups)
    check_choice("group_score", group_score, GROUP_SCORES)
    reachable = top_groups * (num_experts // num_groups)
    if top_k > reachable:
        raise ValueError(
            f"top_k: got {top_k}, wanted at most {reachable}, the experts in top_groups={top_groups} groups"
        )
    check_int("weightless", weightless, low=0, high=num_experts)
    return RouterSpec(
        top_k=top_k,
        score=score,
        normalize=top_k > 1 if normalize is None else bool(normalize),
        scale=float(scale),
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=group_score,
        weightless=weightless,
    )


def gumbel_noise(logits: Tensor) -> Tensor:
    """Draw standard Gumbel noise [T, E] in the router's dtype, from torch's generator: top-k of logits + noise samples
    experts without replacement (Gumbel top-k; DeepSpeed's RSample is its top-1)."""
    uniform = torch.rand(logits.shape, dtype=reference.wide(logits.dtype), device=logits.device)
    tiny = torch.finfo(uniform.dtype).tiny
    return -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()


def route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    normalize: bool | None = None,
    scale: float = 1.0,
    choice_bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int | None = None,
    group_score: str = "max",
    weightless: int = 0,
    noise: Tensor | Literal["gumbel"] | None = None,
    token_mask: Tensor | None = None,
    experts: Tensor | None = None,
    sequences: int = 1,
    backend: str = "auto",
) -> Routing:
    """Choose each token's `top_k` experts and their weights.

    Args:
        logits: [T, E] floating point, the gate's output. The maths runs in fp32 (fp64 for fp64 logits).
        top_k: K experts per token, 1 to E.
        score: "softmax" over all experts before the top-k; "topk_softmax", softmax over the chosen logits after it;
            "sigmoid", each expert by itself (DeepSeek-V3); "sqrt_softplus", sqrt(log(1 + exp(logit))) (DeepSeek-V4).
        normalize: divide a token's weights by their sum. None: when top_k > 1, since a lone weight of constantly 1
            would leave the router without a gradient (Switch keeps the raw probability, GShard and Mixtral normalise).
        scale: multiplies the weights after normalisation (DeepSeek's routed_scaling_factor).
        choice_bias: [E], added to the scores for the choice only, never to a weight (loss-free balancing,
            arXiv 2408.15664).
        num_groups, top_groups, group_score: choose only among the experts of the `top_groups` best of `num_groups`
            equal groups of consecutive experts, ranked by their "max" (DeepSeek-V2) or "top2_sum" (DeepSeek-V3) score.
            top_groups None: all of them.
        weightless: how many of the E experts, the last ones, are null (AdaMoE, arXiv 2406.13233): choosing one costs
            nothing, so that the number of a token's real experts varies. Such a choice counts in the sums, and has
            weight 0 and no part in `normalize`.
        noise: [T, E] added to the logits for the choice only, or "gumbel" to draw it from torch's generator.
        token_mask: [T] bool or integer; tokens where it is 0 get expert -1 and weight 0 and count nowhere. An additive
            float mask (0 and -inf) is refused, since it says the opposite.
        experts: [T, K] int32 or int64, the choice itself, in its order (router replay, arXiv 2510.11370); weights, sums
            and gradients are those of these logits. An id outside [0, E), or one that its row has before, is skipped:
            expert -1, weight 0, counted nowhere. A row that has no other id, such as one of -1, is chosen from the
            logits. -2 leaves a place empty, and a row of -2 its token without experts. Nothing is checked on the host.
        sequences: B equal runs of consecutive tokens, whose sums are `.sequences` of what is returned; divides T.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        Routing, with `.experts` [T, K] int32 and `.weights` [T, K] fp32. Ties go to the lower expert index; NaN logits
        still give distinct experts in range.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or range, by name.
    """
    check_tensor("logits", logits, shape=("T", "E"), dtypes=FLOATS)
    spec = router_spec(
        logits.shape[1],
        top_k,
        score=score,
        normalize=normalize,
        scale=scale,
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=group_score,
        weightless=weightless,
    )
    return route_by_spec(
        logits,
        spec,
        choice_bias=choice_bias,
        noise=noise,
        token_mask=token_mask,
        experts=experts,
        sequences=sequences,
        backend=backend,
    )


def route_by_spec(
    logits: Tensor,
    spec: RouterSpec,
    *,
    choice_bias: Tensor | None = None,
    noise: Tensor | Literal["gumbel"] | None = None,
    token_mask: Tensor | None = None,
    experts: Tensor | None = None,
    given: Tensor | None = None,
    sequences: int = 1,
    hidden: Tensor | None = None,
    backend: str = "auto",
    is_plain: bool | None = None,
) -> Routing:
    """Do what `route` does, for logits and options that are checked already.

    given: [T, K] int32 in the place of `experts`, where the ids of a row are known to be in range and distinct.
    hidden: goes into the Routing.
    is_plain: what `runtime.is_plain` says of the logits, where it was asked already.
    """
    num_tokens, num_experts = logits.shape
    if sequences != 1:
        check_int("sequences", sequences, low=1)
        if num_tokens % sequences:
            raise ValueError(f"sequences: got {sequences}, wanted a divisor of the {num_tokens} tokens")
        spec = replace(spec, sequences=sequences)
    if choice_bias is not None:
        check_tensor("choice_bias", choice_bias, shape=(num_experts,), dtypes=FLOATS, device=logits.device)
        choice_bias = choice_bias.detach()
    if isinstance(noise, str):
        check_choice("noise", noise, ("gumbel",))
        noise = gumbel_noise(logits)
    elif noise is not None:
        check_tensor("noise", noise, shape=(num_tokens, num_experts), dtypes=FLOATS, device=logits.device)
        noise = noise.detach()
    if token_mask is not None:
        check_tensor("token_mask", token_mask, shape=(num_tokens,), dtypes=MASKS, device=logits.device)
        token_mask = token_mask.bool()
    if experts is not None:
        check_tensor("experts", experts, shape=(num_tokens, spec.top_k), dtypes=INTEGERS, device=logits.device)
        given = reference.given_choices(experts, num_experts)
    name = runtime.choose(backend, logits.device, logits.dtype).name
    if name == "reference":
        routing = reference.route(
            logits, spec, choice_bias=choice_bias, noise=noise, token_mask=token_mask, given=given
        )
        return replace(routing, hidden=hidden)
    if hidden is not None and token_mask is None:  # nobody changes the gate's logits before the sums are read
        found = run_inference(logits, choice_bias, noise, given, spec, name, is_plain)
        if found is not None:
            sums = partial(_with_num_valid, found.sums, logits, spec)
            return Routing.unsummed(
                sums, experts=found.experts, weights=found.weights, hidden=hidden, dispatched=found.dispatched
            )
    weights, score_sums, z_sum, experts, counts, dispatched = run_route(
        logits, choice_bias, noise, token_mask, given, spec, name
    )
    num_valid = _num_valid(logits, spec, token_mask)
    return reference.routing_of(experts, weights, counts, score_sums, z_sum, num_valid, hidden, dispatched)


def _with_num_valid(sums: Callable[[], tuple[Tensor, ...]], logits: Tensor, spec: RouterSpec) -> tuple[Tensor, ...]:
    return (*sums(), _num_valid(logits, spec, None))


def _num_valid(logits: Tensor, spec: RouterSpec, token_mask: Tensor | None) -> Tensor:
    """The number of tokens [], or [B] for several sequences, in the dtype of the router's maths."""
    shape = () if spec.sequences == 1 else (spec.sequences,)
    if token_mask is None:
        dtype = reference.wide(logits.dtype)
        return torch.full(shape, logits.shape[0] // spec.sequences, dtype=dtype, device=logits.device)
    return token_mask.view(spec.sequences, -1).sum(1).view(shape).to(reference.wide(logits.dtype))
