"""Modules: the MoE layer and its parts."""

from moe_triton.layers.balance import BalanceAccumulator
from moe_triton.layers.experts import Experts, FeedForward
from moe_triton.layers.moe import MoE, MoEOutput
from moe_triton.layers.router import Router, update_choice_biases

__all__ = ["BalanceAccumulator", "Experts", "FeedForward", "MoE", "MoEOutput", "Router", "update_choice_biases"]
