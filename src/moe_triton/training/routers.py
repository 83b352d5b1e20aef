"""The routers that `moe-triton train --router` can train with, each in its published form where it has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from moe_triton.training.config import TrainConfig

VOCABULARY = 256  # every byte


class RouterSetup(NamedTuple):
    """Options of a `Router`, and those of its `MoE` layer that differ from the run's settings.

    top_k  K of both, where it is a bound or counts null experts; None: the run's
    """

    router: dict[str, Any]
    layer: dict[str, Any]
    top_k: int | None = None


def hash_table(config: TrainConfig) -> torch.Tensor:
    """Draw distinct experts [256, K] for every byte, of the run's seed (Hash Layers, arXiv 2106.04426)."""
    generator = torch.Generator().manual_seed(config.seed)
    return torch.rand(VOCABULARY, config.num_experts, generator=generator).argsort(1)[:, : config.top_k]


def null_experts(config: TrainConfig, **options: Any) -> RouterSetup:
    """Half as many null experts as real ones, so that an even load has K real experts per token (LongCat-Flash)."""
    number = max(1, config.num_experts // 2)
    top_k = round(config.top_k * (config.num_experts + number) / config.num_experts)
    return RouterSetup({"null_experts": number, **options}, {}, min(top_k, config.num_experts))


def bound(config: TrainConfig) -> int:
    """The most experts of a token where their number varies."""
    return min(2 * config.top_k, config.num_experts)


NO_LOSS = {"aux_loss_weight": 0.0}
ROUTERS: dict[str, Callable[[TrainConfig], RouterSetup]] = {
    "softmax": lambda config: RouterSetup({}, {}),
    "topk_softmax": lambda config: RouterSetup({"score": "topk_softmax"}, {}),
    "sigmoid": lambda config: RouterSetup({"score": "sigmoid"}, {}),
    "sqrt_softplus": lambda config: RouterSetup({"score": "sqrt_softplus"}, {}),
    "groups": lambda config: RouterSetup({"num_groups": 4, "top_groups": 2, "group_score": "top2_sum"}, {}),
    "per_sequence": lambda config: RouterSetup({}, {**NO_LOSS, "sequence_loss_weight": config.aux_loss_weight}),
    "sign_bias": lambda config: RouterSetup({"score": "sigmoid", "choice_bias": True}, NO_LOSS),
    "quantile_bias": lambda config: RouterSetup(
        {"score": "sigmoid", "choice_bias": True, "bias_update": "quantile"}, NO_LOSS
    ),
    "identity_experts": null_experts,
    "zero_experts": lambda config: null_experts(config, null_output="zero"),
    "top_p": lambda config: RouterSetup({"top_p": 0.5}, {}, bound(config)),
    # an expert has 96 assignments of a capacity group with the default sizes: six tiles
    "token_rounding": lambda config: RouterSetup({"token_rounding": 16}, {}),
    "expert_choice": lambda config: RouterSetup({"expert_choice": float(config.top_k)}, NO_LOSS, bound(config)),
    "sinkhorn": lambda config: RouterSetup({"sinkhorn": 8}, NO_LOSS),
    "hash": lambda config: RouterSetup({"hash_table": hash_table(config)}, NO_LOSS),
    "forced_balance": lambda config: RouterSetup({"forced_balance": True}, NO_LOSS),
}
GROUPED = ("sinkhorn", "token_rounding")  # rules that look at the batch of a training step only
