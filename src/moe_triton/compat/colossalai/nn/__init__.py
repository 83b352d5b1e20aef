"""Layers and losses, each also under its own name here, as v0.1.6 has them."""

from moe_triton.compat.colossalai.nn import layer, loss, moe
from moe_triton.compat.colossalai.nn.layer import *  # noqa: F403
from moe_triton.compat.colossalai.nn.layer import __all__ as _layers
from moe_triton.compat.colossalai.nn.loss import *  # noqa: F403
from moe_triton.compat.colossalai.nn.loss import __all__ as _losses

__all__ = ["layer", "loss", "moe", *_layers, *_losses]
