"""Other people's layers and signatures over ours."""

from moe_triton.compat import recognizers

__all__ = ["recognizers"]
