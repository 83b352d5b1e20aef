"""A small decoder-only transformer over bytes, with mixture-of-experts or dense feed-forward blocks.

Shapes: B sequences, S bytes each, d hidden size, H heads, h = d / H, L layers, E experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from moe_triton.distributed import ExpertParallel
from moe_triton.layers import Experts, FeedForward, MoE, MoEOutput, Router
from moe_triton.training.config import TrainConfig
from moe_triton.training.routers import GROUPED, ROUTERS, VOCABULARY
from moe_triton.training.workers import ALONE, Workers


class LanguageModelOutput(NamedTuple):
    """logits [B, S, 256] for the next byte; aux_loss, a weighted scalar; expert_counts [L, E] int64 ([L, 0]: dense)."""

    logits: Tensor
    aux_loss: Tensor
    expert_counts: Tensor


def rotary_table(seq_len: int, head_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin [S, h/2] of position * 10000^(-2i/h) (RoPE, arXiv 2104.09864)."""
    frequency = 10000.0 ** (-torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size)
    angle = torch.arange(seq_len, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x_Sh: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pair (x[i], x[i + h/2]) by its position's angle; x [..., S, h]."""
    left, right = x_Sh.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention with rotary positions: [B, S, d] -> [B, S, d]."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = rearrange(self.qkv_proj(x), "b s (three H h) -> three b H s h", three=3, H=self.num_heads)
        q, k = rotate(qkv[:2], cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, qkv[2], is_causal=True)
        return self.out_proj(rearrange(mixed, "b H s h -> b s (H h)"))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection."""

    def __init__(self, config: TrainConfig, kind: str, workers: Workers, parallel: ExpertParallel | None) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.attention = Attention(config.hidden_size, config.num_heads)
        self.feed_forward_norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.feed_forward = feed_forward(config, kind, workers, parallel)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, tokens: Tensor) -> tuple[Tensor, MoEOutput | None]:
        """[B, S, d] of tokens [B, S] -> [B, S, d], and the output of the MoE layer if it is one."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        hidden = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, FeedForward):
            return x + self.feed_forward(hidden), None
        out = self.feed_forward(hidden, token_ids=tokens)
        return x + out.output, out


class LanguageModel(nn.Module):
    """The transformer that `moe-triton train` trains; `kind` is "moe" or "dense".

    Both kinds share everything but the feed-forward blocks. The dense block's size makes the active parameters agree:
    3 d n_dense = K 3 d n + E d, rounded to the nearest n_dense (the router counts as active).
    """

    def __init__(self, config: TrainConfig, kind: str, workers: Workers = ALONE) -> None:
        super().__init__()
        self.config = config
        self.kind = kind
        self.head_size = config.hidden_size // config.num_heads
        self.embedding = nn.Embedding(VOCABULARY, config.hidden_size)
        parallel = workers.expert_parallel() if kind == "moe" else None
        self.blocks = nn.ModuleList(Block(config, kind, workers, parallel) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.head = nn.Linear(config.hidden_size, VOCABULARY, bias=False)
        self.reset_parameters()
        self.computes_in_bf16 = config.dtype == "bfloat16"
        self.to(torch.float32 if self.computes_in_bf16 else getattr(torch, config.dtype))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Scale the initial weights that write into the residual stream by 1/sqrt(2L) (GPT-2)."""
        nn.init.normal_(self.embedding.weight, std=0.5)
        scale = 1 / math.sqrt(2 * len(self.blocks))
        for name, weight in self.named_parameters():
            if "down_proj" in name or "out_proj" in name:
                weight.mul_(scale)

    def forward(self, tokens: Tensor) -> LanguageModelOutput:
        """tokens [B, S] int64 -> the logits of every next byte, in the parameters' dtype."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.computes_in_bf16):
            return self._forward(tokens)

    def _forward(self, tokens: Tensor) -> LanguageModelOutput:
        x = self.embedding(tokens)
        cos, sin = rotary_table(tokens.shape[1], self.head_size, x.device)
        layers: list[MoEOutput] = []
        for block in self.blocks:
            x, out = block(x, cos, sin, tokens)
            if out is not None:
                layers.append(out)
        logits = self.head(self.norm(x)).to(x.dtype)
        if not layers:
            return LanguageModelOutput(logits, logits.new_zeros(()), tokens.new_zeros(len(self.blocks), 0))
        aux_loss = torch.stack([layer.aux_loss for layer in layers]).mean()
        return LanguageModelOutput(logits, aux_loss, torch.stack([layer.expert_counts for layer in layers]))

    def parameter_counts(self) -> tuple[int, int]:
        """Return (all parameters, active ones): of the experts, top_k out of num_experts are active for a token."""
        layers = [module for module in self.modules() if isinstance(module, Experts)]
        here = sum(weight.numel() for layer in layers for weight in layer.parameters())
        experts = sum(weight[0].numel() * layer.num_experts for layer in layers for weight in layer.parameters())
        total = sum(weight.numel() for weight in self.parameters()) - here + experts
        return total, total - experts + experts * self.config.top_k // self.config.num_experts


def dense_width(config: TrainConfig) -> int:
    """Return the inner size of the dense model's blocks."""
    return config.top_k * config.intermediate_size + round(config.num_experts / 3)


def feed_forward(
    config: TrainConfig, kind: str, workers: Workers = ALONE, parallel: ExpertParallel | None = None
) -> MoE | FeedForward:
    """Make one block's feed-forward layer; this process has its share of the run's capacity groups."""
    if kind == "dense":
        return FeedForward(config.hidden_size, dense_width(config))
    setup = ROUTERS[config.router](config)
    top_k = setup.top_k or config.top_k
    groups = max(1, config.num_groups // workers.world)
    options = setup.router | ({"choice_groups": groups} if config.router in GROUPED else {})
    router = Router(config.hidden_size, config.num_experts, top_k, backend=config.backend, **options)
    layer = {
        "capacity_factor": config.capacity_factor * config.top_k / top_k or None,  # the same rows for any top_k
        "eval_capacity_factor": math.inf,
        "capacity_groups": groups if config.capacity_factor else 1,
        "aux_loss_weight": config.aux_loss_weight,
        "z_loss_weight": config.z_loss_weight,
        **setup.layer,
    }
    return MoE(
        config.hidden_size,
        config.intermediate_size,
        config.num_experts,
        top_k,
        router=router,
        fp8=config.fp8,
        expert_parallel=parallel,
        backend=config.backend,
        **layer,
    )
