"""The small frozen records that the operations pass to each other. Shapes: T tokens, K choices, E experts, S = T*K."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

GATED = ("swiglu", "geglu", "geglu_tanh", "reglu", "gpt_oss")
UNGATED = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
ACTIVATIONS = GATED + UNGATED
SCORES = ("softmax", "sigmoid", "topk_softmax")
GROUP_SCORES = ("max", "top2_sum")
PRIORITIES = ("position", "choice", "probability", "random")


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """How logits become choices and weights; the fields are documented at `moe_triton.route`."""

    top_k: int
    score: str = "softmax"
    normalize: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "max"


@dataclass(frozen=True, kw_only=True)
class ExpertSpec:
    """What one expert computes and how its weights lie in memory.

    Default layout: gate_up_proj [E, 2n, d] ([E, n, d] when ungated), down_proj [E, d, n]. `is_transposed` swaps the
    last two dimensions of both. `is_concatenated=False` means that gate and up alternate: g0, u0, g1, u1, ...
    """

    activation: str = "swiglu"
    is_transposed: bool = False
    is_concatenated: bool = True

    @property
    def is_gated(self) -> bool:
        return self.activation in GATED


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Every token's choices, with the sums over tokens that the auxiliary losses need.

    experts     [T, K] int32; -1 for the tokens that `token_mask` leaves out
    weights     [T, K] fp32 (fp64 for fp64 logits), differentiable; 0 where experts is -1
    counts      [E] int32, assignments wanted per expert, before any dropping
    score_sums  [E] sum over tokens of the normalised scores, differentiable
    z_sum       []  sum over tokens of logsumexp(logits)**2, differentiable
    num_tokens  []  number of tokens that count, on the device
    """

    experts: Tensor
    weights: Tensor
    counts: Tensor
    score_sums: Tensor
    z_sum: Tensor
    num_tokens: Tensor


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """Which row goes where. All int32, all of static size, made on the device without a host sync.

    counts    [E]    assignments wanted, before dropping
    offsets   [E+1]  row range of each expert among the kept rows, which lie in expert order
    source    [S]    row -> token*K + choice; -1 past offsets[E]
    position  [T, K] choice -> row; -1 when dropped or skipped
    """

    counts: Tensor
    offsets: Tensor
    source: Tensor
    position: Tensor

    @property
    def num_experts(self) -> int:
        return self.counts.shape[0]

    @property
    def top_k(self) -> int:
        return self.position.shape[1]
