"""Experts, routers, noise and the layers that join them."""

from moe_triton.compat.colossalai.nn.layer.moe.experts import Experts, FFNExperts, MoeExperts, TPExperts
from moe_triton.compat.colossalai.nn.layer.moe.layers import FP32LinearGate, MoeLayer, MoeModule
from moe_triton.compat.colossalai.nn.layer.moe.routers import MoeRouter, Routed, Top1Router, Top2Router
from moe_triton.compat.colossalai.nn.layer.moe.utils import (
    NormalNoiseGenerator,
    UniformNoiseGenerator,
    build_ffn_experts,
)

__all__ = [
    "Experts",
    "FFNExperts",
    "FP32LinearGate",
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
