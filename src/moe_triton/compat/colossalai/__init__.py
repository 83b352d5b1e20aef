"""Colossal-AI's mixture of experts over our layers: its MoE tutorial runs with this package in colossalai's place.

Import paths are upstream's (v0.0.2 and v0.1.6). What deliberately differs: docs/colossalai_reference.md.
"""

from moe_triton.compat.colossalai.launching import initialize, launch, launch_from_torch

__all__ = ["initialize", "launch", "launch_from_torch"]
