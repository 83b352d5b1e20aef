"""moe_triton: a mixture-of-experts runtime for PyTorch, with fused Triton kernels under a thin autograd layer."""

from typing import TYPE_CHECKING, Any

from moe_triton import compat
from moe_triton.dispatch import dispatch, expert_capacity, renormalize
from moe_triton.distributed import export_safetensors
from moe_triton.experts import moe_experts, moe_mlp
from moe_triton.explain import Explanation, explain
from moe_triton.integrations.pretrained import load_pretrained
from moe_triton.integrations.registration import register_quantizer as _register_quantizer
from moe_triton.integrations.upcycling import upcycle
from moe_triton.layers import (
    BalanceAccumulator,
    Experts,
    FeedForward,
    MoE,
    MoEOutput,
    Router,
    update_choice_biases,
)
from moe_triton.losses import load_balance_loss, z_loss
from moe_triton.metrics import LoadMonitor, LoadStatistics, load_statistics, plot_load, plot_load_map
from moe_triton.quantization import QuantizedWeight
from moe_triton.quantize import QuantizeReport, quantize
from moe_triton.records import Dispatch, Lora, Routing
from moe_triton.replay import RoutingRecorder
from moe_triton.routing import route
from moe_triton.runtime import batch_invariant
from moe_triton.swap import SwapReport, swap

__version__ = "0.1.0"

if TYPE_CHECKING:
    from moe_triton.integrations.quantizer import MoeTritonConfig

__all__ = [
    "BalanceAccumulator",
    "Dispatch",
    "Experts",
    "Explanation",
    "FeedForward",
    "LoadMonitor",
    "LoadStatistics",
    "Lora",
    "MoE",
    "MoEOutput",
    "MoeTritonConfig",
    "QuantizeReport",
    "QuantizedWeight",
    "Router",
    "Routing",
    "RoutingRecorder",
    "SwapReport",
    "batch_invariant",
    "compat",
    "dispatch",
    "expert_capacity",
    "explain",
    "export_safetensors",
    "load_balance_loss",
    "load_pretrained",
    "load_statistics",
    "moe_experts",
    "moe_mlp",
    "plot_load",
    "plot_load_map",
    "quantize",
    "renormalize",
    "route",
    "swap",
    "upcycle",
    "update_choice_biases",
    "z_loss",
]

_register_quantizer()


def __getattr__(name: str) -> Any:
    if name == "MoeTritonConfig":  # a class of transformers', which is not imported before it is asked for
        from moe_triton.integrations.quantizer import MoeTritonConfig

        return MoeTritonConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
