"""Losses."""

from moe_triton.compat.colossalai.nn.loss.loss_moe import MoeCrossEntropyLoss, MoeLoss

__all__ = ["MoeCrossEntropyLoss", "MoeLoss"]
