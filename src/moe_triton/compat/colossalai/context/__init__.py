"""Where this process stands among the others, and its random numbers."""

from moe_triton.compat.colossalai.context.moe_context import MOE_CONTEXT
from moe_triton.compat.colossalai.context.parallel_context import ParallelContext, global_context
from moe_triton.compat.colossalai.context.parallel_mode import ParallelMode
from moe_triton.compat.colossalai.context.random import (
    add_seed,
    get_current_mode,
    get_seeds,
    moe_set_seed,
    reset_seeds,
    seed,
    set_seed,
    with_seed,
)

__all__ = [
    "MOE_CONTEXT",
    "ParallelContext",
    "ParallelMode",
    "add_seed",
    "get_current_mode",
    "get_seeds",
    "global_context",
    "moe_set_seed",
    "reset_seeds",
    "seed",
    "set_seed",
    "with_seed",
]
