"""Our layer, by backend."""

from __future__ import annotations

from collections.abc import Callable

from moe_triton import runtime
from moe_triton.benchmarking.cases import Workload
from moe_triton.benchmarking.providers.block import Block, Unavailable, share
from moe_triton.layers import MoE


def ours(backend: str) -> Callable[[Workload], Block]:
    def build(workload: Workload) -> Block:
        case, device = workload.case, workload.hidden.device
        try:
            chosen = runtime.choose(backend, device, case.torch_dtype)
        except RuntimeError as error:
            raise Unavailable("not measured", str(error)) from error
        layer = MoE(
            case.hidden,
            case.intermediate,
            case.experts,
            case.top_k,
            activation=case.activation,
            bias=case.bias,
            backend=backend,
            device="meta",
            dtype=case.torch_dtype,
        )
        layer.router.weight = share(workload.gate)
        layer.experts.gate_up_proj = share(workload.gate_up)
        layer.experts.down_proj = share(workload.down)
        parameters = {
            "gate": layer.router.weight,
            "gate_up": layer.experts.gate_up_proj,
            "down": layer.experts.down_proj,
        }
        if workload.gate_up_bias is not None and workload.down_bias is not None:
            layer.experts.gate_up_proj_bias = share(workload.gate_up_bias)
            layer.experts.down_proj_bias = share(workload.down_bias)
            parameters["gate_up_bias"] = layer.experts.gate_up_proj_bias
            parameters["down_bias"] = layer.experts.down_proj_bias
        return Block(
            forward=lambda x: layer(x).output,
            choose=lambda x: layer.router(x).experts,
            parameters=parameters,
            label=f"moe_triton ({chosen.name})",
        )

    return build
