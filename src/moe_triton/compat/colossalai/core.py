"""The two global objects, under v0.1.6's path."""

from moe_triton.compat.colossalai.context.moe_context import MOE_CONTEXT
from moe_triton.compat.colossalai.context.parallel_context import global_context

__all__ = ["MOE_CONTEXT", "global_context"]
