"""All containers of experts, under v0.1.6's path."""

from moe_triton.compat.colossalai.nn.layer.moe.base import MoeExperts
from moe_triton.compat.colossalai.nn.layer.moe.ffn_experts import FFNExperts, TPExperts
from moe_triton.compat.colossalai.nn.layer.moe.module_experts import Experts

__all__ = ["Experts", "FFNExperts", "MoeExperts", "TPExperts"]
