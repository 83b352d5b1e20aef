"""The engine and its gradient handler."""

from moe_triton.compat.colossalai.engine.engine import Engine
from moe_triton.compat.colossalai.engine.gradient_handler import MoeGradientHandler, holds_experts

__all__ = ["Engine", "MoeGradientHandler", "holds_experts"]
