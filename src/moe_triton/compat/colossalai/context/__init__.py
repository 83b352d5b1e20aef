"""Where this process stands among the others, and its random numbers."""

from moe_triton.compat.colossalai.context.moe_context import MOE_CONTEXT
from moe_triton.compat.colossalai.context.parallel_context import ParallelContext, global_context
from moe_triton.compat.colossalai.context.parallel_mode import ParallelMode
from moe_triton.compat.colossalai.context.random import add_seed, get_current_mode, moe_set_seed, seed, set_seed

__all__ = [
    "MOE_CONTEXT",
    "ParallelContext",
    "ParallelMode",
    "add_seed",
    "get_current_mode",
    "global_context",
    "moe_set_seed",
    "seed",
    "set_seed",
]
