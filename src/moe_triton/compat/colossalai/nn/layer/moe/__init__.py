"""Experts, routers, noise and the layers that join them."""

from moe_triton.compat.colossalai.nn.layer.moe.experts import Experts, MoeExperts
from moe_triton.compat.colossalai.nn.layer.moe.ffn_experts import FFNExperts, TPExperts, build_ffn_experts
from moe_triton.compat.colossalai.nn.layer.moe.layers import MoeLayer, MoeModule
from moe_triton.compat.colossalai.nn.layer.moe.noise import NormalNoiseGenerator, UniformNoiseGenerator
from moe_triton.compat.colossalai.nn.layer.moe.routers import MoeRouter, Routed, Top1Router, Top2Router

__all__ = [
    "Experts",
    "FFNExperts",
    "MoeExperts",
    "MoeLayer",
    "MoeModule",
    "MoeRouter",
    "NormalNoiseGenerator",
    "Routed",
    "TPExperts",
    "Top1Router",
    "Top2Router",
    "UniformNoiseGenerator",
    "build_ffn_experts",
]
