"""moe_triton: a mixture-of-experts runtime for PyTorch, with fused Triton kernels under a thin autograd layer."""

from moe_triton import compat
from moe_triton.dispatch import dispatch, expert_capacity, renormalize
from moe_triton.experts import moe_mlp
from moe_triton.integrations.swap import SwapReport, swap
from moe_triton.layers import Experts, FeedForward, MoE, MoEOutput, Router, update_choice_biases
from moe_triton.losses import load_balance_loss, z_loss
from moe_triton.records import Dispatch, Routing
from moe_triton.routing import route

__version__ = "0.1.0"

__all__ = [
    "Dispatch",
    "Experts",
    "FeedForward",
    "MoE",
    "MoEOutput",
    "Router",
    "Routing",
    "SwapReport",
    "compat",
    "dispatch",
    "expert_capacity",
    "load_balance_loss",
    "moe_mlp",
    "renormalize",
    "route",
    "swap",
    "update_choice_biases",
    "z_loss",
]
