"""Routing: logits -> each token's experts and weights. Validation and the choice of backend.

Definition: `moe_triton.reference.route`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from moe_triton import reference, runtime
from moe_triton.autograd.routing import run_route
from moe_triton.checks import FLOATS, MASKS, check_choice, check_int, check_number, check_tensor
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
    return RouterSpec(
        top_k=top_k,
        score=score,
        normalize=top_k > 1 if normalize is None else bool(normalize),
        scale=float(scale),
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=group_score,
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
    noise: Tensor | Literal["gumbel"] | None = None,
    token_mask: Tensor | None = None,
    backend: str = "auto",
) -> Routing:
    """Choose each token's `top_k` experts and their weights.

    Args:
        logits: [T, E] floating point, the gate's output. The maths runs in fp32 (fp64 for fp64 logits).
        top_k: K experts per token, 1 to E.
        score: "softmax" over all experts before the top-k; "topk_softmax", softmax over the chosen logits after it;
            "sigmoid", each expert by itself (DeepSeek-V3).
        normalize: divide a token's weights by their sum. None: when top_k > 1, since a lone weight of constantly 1
            would leave the router without a gradient (Switch keeps the raw probability, GShard and Mixtral normalise).
        scale: multiplies the weights after normalisation (DeepSeek's routed_scaling_factor).
        choice_bias: [E], added to the scores for the choice only, never to a weight (loss-free balancing,
            arXiv 2408.15664).
        num_groups, top_groups, group_score: choose only among the experts of the `top_groups` best of `num_groups`
            equal groups of consecutive experts, ranked by their "max" (DeepSeek-V2) or "top2_sum" (DeepSeek-V3) score.
            top_groups None: all of them.
        noise: [T, E] added to the logits for the choice only, or "gumbel" to draw it from torch's generator.
        token_mask: [T] bool or integer; tokens where it is 0 get expert -1 and weight 0 and count nowhere. An additive
            float mask (0 and -inf) is refused, since it says the opposite.
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
    )
    return route_by_spec(logits, spec, choice_bias=choice_bias, noise=noise, token_mask=token_mask, backend=backend)


def route_by_spec(
    logits: Tensor,
    spec: RouterSpec,
    *,
    choice_bias: Tensor | None = None,
    noise: Tensor | Literal["gumbel"] | None = None,
    token_mask: Tensor | None = None,
    hidden: Tensor | None = None,
    backend: str = "auto",
) -> Routing:
    """Do what `route` does, for options that `router_spec` has checked already; `hidden` goes into the Routing."""
    num_tokens, num_experts = check_tensor("logits", logits, shape=("T", "E"), dtypes=FLOATS).shape
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
    name = runtime.choose(backend, logits.device, logits.dtype).name
    if name == "reference":
        routing = reference.route(logits, spec, choice_bias=choice_bias, noise=noise, token_mask=token_mask)
        return replace(routing, hidden=hidden)

    weights, score_sums, z_sum, experts, counts = run_route(logits, choice_bias, noise, token_mask, spec, name)
    num_valid = torch.full((), num_tokens, device=logits.device) if token_mask is None else token_mask.sum()
    return Routing(
        experts=experts,
        weights=weights,
        counts=counts,
        score_sums=score_sums,
        z_sum=z_sum,
        num_tokens=num_valid.to(weights.dtype),
        hidden=hidden,
    )
