"""The trainer and its hooks."""

from moe_triton.compat.colossalai.trainer import hooks
from moe_triton.compat.colossalai.trainer.trainer import Trainer

__all__ = ["Trainer", "hooks"]
