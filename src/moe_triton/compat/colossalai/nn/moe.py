"""`colossalai.nn.moe`, as the tutorial calls `nn.layer.moe`."""

from moe_triton.compat.colossalai.nn.layer.moe import *  # noqa: F403
from moe_triton.compat.colossalai.nn.layer.moe import __all__ as __all__
