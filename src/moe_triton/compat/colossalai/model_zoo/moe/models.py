"""WideNet (arXiv 2107.11817): a vision transformer whose blocks share one attention, one router and one set of experts.

Shapes: B images, N patches, d model width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_triton.checks import check_int, check_tensor
from moe_triton.compat.colossalai.context.moe_context import MOE_CONTEXT
from moe_triton.compat.colossalai.context.parallel_context import global_context
from moe_triton.compat.colossalai.context.parallel_mode import ParallelMode
from moe_triton.compat.colossalai.nn.layer.dropout import WrappedDropout, WrappedDropPath
from moe_triton.compat.colossalai.nn.layer.moe import Experts, MoeLayer, NormalNoiseGenerator, Top2Router
from moe_triton.compat.colossalai.nn.layer.parallel_1d import Linear1D_Col, Linear1D_Row


class VanillaFFN(nn.Module):
    """Linear, activation (None: GELU), dropout, Linear, dropout; a dropout that is given replaces drop_rate's."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: nn.Module | None = None,
        drop_rate: float = 0,
        bias: bool = True,
        dropout1: nn.Module | None = None,
        dropout2: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.ffn = nn.Sequential(
            nn.Linear(d_model, d_ff, bias),
            nn.GELU() if activation is None else activation,
            nn.Dropout(drop_rate) if dropout1 is None else dropout1,
            nn.Linear(d_ff, d_model, bias),
            nn.Dropout(drop_rate) if dropout2 is None else dropout2,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        return self.ffn(x)


class VanillaSelfAttention(nn.Module):
    """Softmax attention of every token to every other; the tensor-parallel ranks split its heads."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_kv: int,
        attention_drop: float = 0,
        drop_rate: float = 0,
        bias: bool = True,
        dropout1: nn.Module | None = None,
        dropout2: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_int("n_heads", n_heads, low=1)
        size = global_context.get_world_size(ParallelMode.TENSOR)
        if n_heads % size:
            raise ValueError(f"n_heads: got {n_heads}, wanted a multiple of the {size} tensor-parallel ranks")
        self.n_heads = n_heads // size
        self.dense1 = Linear1D_Col(d_model, 3 * n_heads * d_kv, bias, parts=3)
        self.atten_drop = nn.Dropout(attention_drop) if dropout1 is None else dropout1
        self.dense2 = Linear1D_Row(n_heads * d_kv, d_model)
        self.dropout = nn.Dropout(drop_rate) if dropout2 is None else dropout2

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, d] -> [B, N, d]."""
        q, k, v = rearrange(self.dense1(x), "b n (three h d) -> three b h n d", three=3, h=self.n_heads)
        if self.training and getattr(self.atten_drop, "p", 0) > 0:
            scores = (q @ k.mT) * q.shape[-1] ** -0.5
            out = self.atten_drop(scores.softmax(-1)) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.dropout(self.dense2(rearrange(out, "b h n d -> b n (h d)")))


class PatchEmbedding(nn.Module):
    """Images [B, C, H, W] -> patches [B, N, d], with a learned position each."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_size: int) -> None:
        super().__init__()
        check_int("patch_size", patch_size, low=1)
        if img_size % patch_size:
            raise ValueError(f"img_size: got {img_size}, wanted a multiple of patch_size={patch_size}")
        self.shape = (in_chans, img_size, img_size)
        self.proj = nn.Conv2d(in_chans, embed_size, patch_size, stride=patch_size)
        self.position = nn.Parameter(torch.zeros(1, (img_size // patch_size) ** 2, embed_size))
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        check_tensor("images", images, shape=("B", *self.shape))
        return rearrange(self.proj(images), "b d h w -> b (h w) d") + self.position


class TransformerLayer(nn.Module):
    """x + att(norm1(x)), then x + ffn(norm2(x)); a sample skips either by stochastic depth."""

    def __init__(
        self, att: nn.Module, ffn: nn.Module, norm1: nn.Module, norm2: nn.Module, droppath: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.att, self.ffn, self.norm1, self.norm2 = att, ffn, norm1, norm2
        self.droppath = nn.Identity() if droppath is None else droppath

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.droppath(self.att(self.norm1(x)))
        return x + self.droppath(self.ffn(self.norm2(x)))


class Widenet(nn.Module):
    """Patches, dropout, `depth` pre-norm blocks with shared attention, router and experts, norm, mean, classifier.

    Only the norms (eps 1e-6) and the gates are a block's own. The classifier starts at zero.

    Args:
        num_experts: E.
        capacity_factor: of the router (v0.0.2: C = ceil(2 * factor * S / E)); None drops nothing.
        img_size, patch_size, in_chans, num_classes: of the images, which are square.
        depth: blocks.
        d_model, num_heads, d_kv: of the attention.
        d_ff: width of an expert.
        attention_drop, drop_rate, drop_path: dropout of the attention's weights and of activations; depth dropped in
            the last block (linear in the depth).
        noisy: put `NormalNoiseGenerator` on the router's logits, as upstream does.
        checkpoint_blocks: keep only the blocks' inputs for backward, and run each block again there.
    """

    def __init__(
        self,
        num_experts: int,
        capacity_factor: float | None,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        depth: int = 12,
        d_model: int = 768,
        num_heads: int = 12,
        d_kv: int = 64,
        d_ff: int = 4096,
        attention_drop: float = 0.0,
        drop_rate: float = 0.1,
        drop_path: float = 0.0,
        *,
        noisy: bool = True,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        check_int("depth", depth, low=1)
        attention = VanillaSelfAttention(**moe_sa_args(d_model, num_heads, d_kv, attention_drop, drop_rate))
        router = Top2Router(
            capacity_factor=capacity_factor, noisy_func=NormalNoiseGenerator(num_experts) if noisy else None
        )
        experts = Experts(expert=VanillaFFN, num_experts=num_experts, **moe_mlp_args(d_model, d_ff, drop_rate))
        self.embedding = PatchEmbedding(img_size, patch_size, in_chans, d_model)
        self.dropout = WrappedDropout(drop_rate)
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.ModuleList(
            TransformerLayer(
                att=attention,
                ffn=MoeLayer(dim_model=d_model, num_experts=num_experts, router=router, experts=experts),
                norm1=nn.LayerNorm(d_model, eps=1e-6),
                norm2=nn.LayerNorm(d_model, eps=1e-6),
                droppath=WrappedDropPath(rate),
            )
            for rate in rates
        )
        self.norm = nn.LayerNorm(d_model, eps=1e-6)
        self.linear = nn.Linear(d_model, num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.checkpoint_blocks = checkpoint_blocks

    def forward(self, images: Tensor) -> Tensor:
        """[B, in_chans, img_size, img_size] -> logits [B, num_classes]."""
        MOE_CONTEXT.reset_loss()
        x = self.dropout(self.embedding(images))
        for block in self.blocks:
            if self.checkpoint_blocks and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.linear(self.norm(x).mean(1))


def moe_mlp_args(d_model: int, d_ff: int, drop_rate: float, bias: bool = True) -> dict[str, Any]:
    """Return the arguments of a `VanillaFFN` that is an expert: dropouts whose ranks draw differently."""
    return {
        "d_model": d_model,
        "d_ff": d_ff,
        "bias": bias,
        "dropout1": WrappedDropout(drop_rate, mode=ParallelMode.TENSOR),
        "dropout2": WrappedDropout(drop_rate, mode=ParallelMode.TENSOR),
    }


def moe_sa_args(
    d_model: int, n_heads: int, d_kv: int, attention_drop: float = 0, drop_rate: float = 0, bias: bool = True
) -> dict[str, Any]:
    """Return the arguments of a `VanillaSelfAttention`: dropouts that follow what the ranks share."""
    return {
        "d_model": d_model,
        "n_heads": n_heads,
        "d_kv": d_kv,
        "bias": bias,
        "dropout1": WrappedDropout(attention_drop, mode=ParallelMode.TENSOR),  # each rank's own heads
        "dropout2": WrappedDropout(drop_rate, mode=ParallelMode.TOKENS),
    }
