"""Other people's layers that `moe_triton.swap` replaces. Nothing is imported before such a layer is met."""

from __future__ import annotations

import sys

from torch import nn

from moe_triton.integrations.swap import Skipped, Swapped, register_recognizer


def deepspeed_layer(model: nn.Module, name: str, module: nn.Module, backend: str) -> Swapped | Skipped | None:
    """DeepSpeed's MoE, or ours in its place."""
    upstream = sys.modules.get("deepspeed.moe.layer")
    ours = sys.modules.get("moe_triton.compat.deepspeed.layer")
    kind = type(module).__name__
    if ours is not None and isinstance(module, ours.MoE):
        return Skipped(name, kind, "is moe_triton's own already")
    if upstream is None or not isinstance(module, upstream.MoE):
        return None
    from moe_triton.compat.deepspeed import convert

    reason = convert.obstacle(module)
    if reason is None and name == "":
        reason = "is the model itself: there is nothing above it to put another layer into"
    if reason is not None:
        return Skipped(name, kind, reason)
    layer = convert.from_upstream(module, backend)
    for parent in list(model.modules()):  # a shared layer is replaced wherever it is
        for key, child in parent._modules.items():
            if child is module:
                parent._modules[key] = layer
    mlp = layer.deepspeed_moe.experts.mlp
    how = "called one by one" if mlp is None else f"fused, {mlp.activation}"
    return Swapped(name, kind, f"moe_triton.compat.deepspeed.layer.MoE, backend={backend!r}: experts {how}")


register_recognizer(deepspeed_layer)
