"""Layers and losses."""

from moe_triton.compat.colossalai.nn import layer, loss, moe

__all__ = ["layer", "loss", "moe"]
