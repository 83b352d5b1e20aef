"""Turn DeepSpeed's own layers into ours, with the same parameters."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from moe_triton.compat.deepspeed.layer import MoE
from moe_triton.compat.mlps import is_tampered, recognise

PARTS = {
    "": "deepspeed.moe.layer.MoE",
    "deepspeed_moe": "deepspeed.moe.sharded_moe.MOELayer",
    "deepspeed_moe.gate": "deepspeed.moe.sharded_moe.TopKGate",
    "deepspeed_moe.gate.wg": "torch.nn.Linear",
    "deepspeed_moe.experts": "deepspeed.moe.experts.Experts",
}

# a layer's options, by the module of DeepSpeed's layer that holds them
OF_LAYER = ("num_experts", "ep_size", "use_residual", "enable_expert_tensor_parallelism")
OF_GATE = (
    "k", "capacity_factor", "eval_capacity_factor", "min_capacity", "noisy_gate_policy", "drop_tokens", "use_rts",
    "top2_2nd_expert_sampling",
)  # fmt: skip


def obstacle(layer: nn.Module) -> str | None:
    """Return why a layer that derives from DeepSpeed's MoE cannot be replaced by ours, or None."""
    for name, wanted in PARTS.items():
        part = layer.get_submodule(name)
        module, _, kind = wanted.rpartition(".")
        if type(part) is not getattr(importlib.import_module(module), kind):
            return f"{name or 'the layer'}: got {type(part).__name__}, wanted {wanted} itself"
        if is_tampered(part):
            return f"{name or 'the layer'}: has hooks, or a forward of its own, that a replacement would lose"
    return None


def from_upstream(layer: Any, backend: str = "auto") -> MoE:
    """Make our layer with the options, experts, gate and training flags of DeepSpeed's; `obstacle` must be None."""
    gate = layer.deepspeed_moe.gate
    with torch.random.fork_rng(devices=()), torch.device("meta"):  # all of it is replaced below
        ours = MoE(
            gate.wg.in_features,
            nn.Identity(),
            **{name: getattr(layer, name) for name in OF_LAYER},
            **{name: getattr(gate, name) for name in OF_GATE},
            backend=backend,
        )
    ours.deepspeed_moe.gate.wg = gate.wg
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    found = {recognise(expert) for expert in experts}
    ours.deepspeed_moe.experts.adopt(experts, found.pop() if len(found) == 1 else None)
    if layer.use_residual:
        ours.mlp, ours.coefficient = layer.mlp, layer.coefficient
    for name in PARTS:
        ours.get_submodule(name).training = layer.get_submodule(name).training
    return ours
