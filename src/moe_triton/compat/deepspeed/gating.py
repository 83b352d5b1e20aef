"""DeepSpeed's gating (deepspeed/moe/sharded_moe.py, 0.19) on our operations.

In place of DeepSpeed's [S, E, C] masks there are a Routing and a Dispatch: memory grows with S*E, never with the
capacity. Noise is drawn in DeepSpeed's shapes and order from torch's generator, so that the same seed makes the same
choices. Shapes: S tokens, E experts, K choices, d hidden size, C capacity.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Gumbel, Uniform

from moe_triton import losses
from moe_triton.checks import FLOATS, check_choice, check_int, check_number, check_tensor
from moe_triton.dispatch import dispatch, renormalize
from moe_triton.records import Dispatch
from moe_triton.reference import wide
from moe_triton.routing import route

POLICIES = (None, "None", "Jitter", "RSample")
DROP_POLICIES = {"probs": "probability", "position": "position"}  # DeepSpeed's names of our priorities
JITTER = 1e-2


class Gating(NamedTuple):
    """The gate's decisions for S tokens.

    l_aux       [] the load-balance loss, differentiable, unweighted
    exp_counts  [E] int64, assignments wanted per expert, before dropping
    experts     [S, K] int32; -1 for tokens that `used_token` leaves out
    weights     [S, K] fp32, differentiable; for K >= 2 renormalised over the choices that survive
    dispatched  the Dispatch: which assignments survive the capacity, and where they go
    """

    l_aux: Tensor
    exp_counts: Tensor
    experts: Tensor
    weights: Tensor
    dispatched: Dispatch


def capacity(num_tokens: int, num_experts: int, capacity_factor: float, min_capacity: int) -> int:
    """Return C = max(min_capacity, ceil(S/E * factor)) in fp32 as DeepSpeed computes it; never clamped to S.

    `moe_triton.expert_capacity` computes on the decimal that the user wrote instead.
    """
    exact = np.float32(num_tokens / num_experts) * np.float32(capacity_factor)
    return max(min_capacity, int(np.ceil(exact)))


def top_k_gating(
    logits: Tensor,
    k: int,
    *,
    capacity_factor: float = 1.0,
    min_capacity: int = 4,
    used_token: Tensor | None = None,
    rsample: bool = False,
    drop_tokens: bool = True,
    use_rts: bool = True,
    top2_2nd_expert_sampling: bool = False,
    drop_policy: str = "probs",
    backend: str = "auto",
) -> Gating:
    """Gate as DeepSpeed's top1gating, top2gating and topkgating do.

    - k = 1: weight = softmax(logits)[chosen]; l_aux = E * sum_e mean(gates)_e * mean(chosen)_e (Switch).
    - k = 2: l_aux counts first choices only; all first choices have precedence over second ones (GShard).
    - k > 2: l_aux = E / k * sum_e mean(gates)_e * mean(chosen)_e over all k choices; `drop_policy` says who survives.

    Means are over all S tokens, used or not. l_aux and exp_counts are taken before anything is dropped.

    Args:
        logits: [S, E] floating point; the maths runs in fp32 (fp64 for fp64 logits).
        k: choices per token, 1 to E.
        capacity_factor: C = max(min_capacity, ceil(k * capacity_factor * S / E)).
        min_capacity: floor of C; for k = 1 at most S.
        used_token: [S] 0/1 mask of any dtype; a token gets experts where it is above 0. (An additive mask of 0
            and -inf leaves every token without experts.)
        rsample: for k = 1, choose by logits + Gumbel noise; the weight stays noise-free.
        drop_tokens: False keeps every assignment: truly dropless, nothing is padded to the fullest expert.
        use_rts: for k = 1, sample the surviving tokens at random (Random Token Selection); else keep the earliest.
        top2_2nd_expert_sampling: for k = 2, choose the second expert by logits + Gumbel noise.
        drop_policy: for k > 2, "probs" keeps each expert's C highest probabilities, "position" its C earliest tokens.
        backend: "auto", "triton", "torch" or "reference".

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or range, by name.
    """
    num_tokens, num_experts = check_tensor("logits", logits, shape=("S", "E"), dtypes=FLOATS).shape
    check_int("k", k, low=1, high=num_experts)
    check_choice("drop_policy", drop_policy, tuple(DROP_POLICIES))
    if used_token is not None:
        check_tensor("used_token", used_token, shape=(num_tokens,), device=logits.device)
    if k == 1 and drop_tokens and 0 < num_tokens < min_capacity:
        raise ValueError(f"min_capacity: got {min_capacity} for {num_tokens} tokens, wanted at most that many when k=1")

    noise = _choice_noise(logits, k, rsample, top2_2nd_expert_sampling)
    routing = route(logits, k, normalize=False, noise=noise, backend=backend)
    experts, weights = routing.experts, routing.weights
    if used_token is not None:  # not given to `route`, because DeepSpeed's mean of the gates includes unused tokens
        unused_S1 = ~(used_token > 0)[:, None]
        experts, weights = experts.masked_fill(unused_S1, -1), weights.masked_fill(unused_S1, 0.0)
    keys = _random_keys(experts, num_experts) if k == 1 and use_rts else None
    limit = capacity(num_tokens, num_experts, capacity_factor * k, min_capacity) if drop_tokens else None
    if k == 1:
        priority = "probability" if keys is not None else "position"
    else:
        priority = "choice" if k == 2 else DROP_POLICIES[drop_policy]
    dispatched = dispatch(
        experts,
        num_experts,
        capacity=limit,
        priority=priority,
        weights=weights if keys is None else keys,
        backend=backend,
    )
    counts = _count(experts[:, 0], num_experts) if k == 2 else dispatched.counts
    l_aux = losses.load_balance_loss(counts, routing.score_sums, routing.num_tokens, 1 if k == 2 else k)
    if k > 1:
        weights = renormalize(weights, dispatched)
    return Gating(l_aux, dispatched.counts.long(), experts, weights, dispatched)


def _choice_noise(logits: Tensor, k: int, rsample: bool, second_expert_sampling: bool) -> Tensor | None:
    """Return what is added to the logits for the choice only, [S, E], or None."""
    if not (rsample if k == 1 else k == 2 and second_expert_sampling):
        return None
    zero = torch.zeros((), dtype=wide(logits.dtype), device=logits.device)
    noise_SE = Gumbel(zero, zero + 1, validate_args=False).sample(logits.shape)
    if k == 2:  # the first expert is chosen without noise
        noise_SE.scatter_(1, logits.argmax(1, keepdim=True), float("inf"))
    return noise_SE


def _random_keys(experts: Tensor, num_experts: int) -> Tensor:
    """Return a random number for every assignment [S, 1], out of the [S, E] that DeepSpeed draws."""
    keys_SE = torch.rand(experts.shape[0], num_experts, device=experts.device)
    return keys_SE.gather(1, experts.long().clamp_min(0))


def _count(experts: Tensor, num_experts: int) -> Tensor:
    """Return how often each expert occurs, [E] int32, without -1. Unlike bincount it needs no host sync."""
    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=experts.device)
    ids = experts.long().remainder(num_experts + 1)  # -1 becomes E
    return counts.scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))[:num_experts]


class TopKGate(nn.Module):
    """DeepSpeed's gate: logits = wg(x) in fp32, then `top_k_gating` with the options of the present mode.

    `wg` is an nn.Linear(d, E) without bias. Noise is for training only: "Jitter" multiplies the gate's input by
    U(0.99, 1.01), "RSample" adds Gumbel noise for the choice (k = 1), and so does `top2_2nd_expert_sampling` for the
    second expert (k = 2; DeepSpeed does the latter in eval too). The arguments are DeepSpeed's, in its order;
    `ep_group` must be None.
    """

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 8,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        ep_group: None = None,
        top2_2nd_expert_sampling: bool = True,
        *,
        drop_policy: str = "probs",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if ep_group is not None:
            raise ValueError(f"ep_group: got {ep_group!r}, wanted None: the layer that holds the gate has the groups")
        check_int("k", k, low=1, high=num_experts)
        check_number("capacity_factor", capacity_factor, above=0)
        check_number("eval_capacity_factor", eval_capacity_factor, above=0)
        check_int("min_capacity", min_capacity, low=0)
        if noisy_gate_policy not in POLICIES:
            wanted = ", ".join(str(policy) for policy in POLICIES)
            raise ValueError(f"noisy_gate_policy: got {noisy_gate_policy!r}, wanted one of {wanted}")
        check_choice("drop_policy", drop_policy, tuple(DROP_POLICIES))
        self.wg = nn.Linear(model_dim, num_experts, bias=False)
        self.k = k
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.min_capacity = min_capacity
        self.noisy_gate_policy = noisy_gate_policy
        self.drop_tokens = drop_tokens
        self.use_rts = use_rts
        self.top2_2nd_expert_sampling = top2_2nd_expert_sampling
        self.drop_policy = drop_policy
        self.backend = backend

    def logits(self, x: Tensor) -> Tensor:
        """[S, d] -> [S, E] in fp32 (fp64 for fp64 weights), also under autocast."""
        dtype = wide(self.wg.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(dtype)
            if self.training and self.noisy_gate_policy == "Jitter":
                low, high = (torch.tensor(1 + sign * JITTER, dtype=dtype, device=x.device) for sign in (-1, 1))
                x = x * Uniform(low, high, validate_args=False).sample(x.shape)
            return F.linear(x, self.wg.weight.to(dtype))

    def capacity(self, num_tokens: int) -> int | None:
        """Return how many of one rank's assignments an expert keeps in the present mode; None for all."""
        if not self.drop_tokens:
            return None
        factor = self.k * (self.capacity_factor if self.training else self.eval_capacity_factor)
        return capacity(num_tokens, self.wg.out_features, factor, self.min_capacity)

    def forward(self, x: Tensor, used_token: Tensor | None = None) -> Gating:
        """x [S, d], used_token [S] or None."""
        return top_k_gating(
            self.logits(x),
            self.k,
            capacity_factor=self.capacity_factor if self.training else self.eval_capacity_factor,
            min_capacity=self.min_capacity,
            used_token=used_token,
            rsample=self.training and self.noisy_gate_policy == "RSample",
            drop_tokens=self.drop_tokens,
            use_rts=self.use_rts,
            top2_2nd_expert_sampling=self.training and self.top2_2nd_expert_sampling,
            drop_policy=self.drop_policy,
            backend=self.backend,
        )
