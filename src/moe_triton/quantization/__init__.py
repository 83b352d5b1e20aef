"""Projections in few bits: the formats, and `QuantizedWeight`, which holds one."""

from moe_triton.quantization.weight import QuantizedWeight

__all__ = ["QuantizedWeight"]
