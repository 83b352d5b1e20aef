"""Our layer, by backend."""

from __future__ import annotations

from collections.abc import Callable

from moe_triton import runtime
from moe_triton.benchmarking.cases import Workload
from moe_triton.benchmarking.providers.block import Block, Unavailable, share
from moe_triton.layers import MoE
from moe_triton.layers.quantized import quantize_projection


def ours(backend: str) -> Callable[[Workload], Block]:
    def build(workload: Workload) -> Block:
        case, device = workload.case, workload.hidden.device
        try:
            chosen = runtime.choose(backend, device, case.torch_dtype)
        except RuntimeError as error:
            raise Unavailable("not measured", str(error)) from error
        layer = MoE(
            case.hidden, case.intermediate, case.experts, case.top_k, activation=case.activation, bias=case.bias,
            fp8=case.fp8, backend=backend, device="meta", dtype=case.torch_dtype,
        )  # fmt: skip
        layer.router.weight = share(workload.gate)
        experts = {name: share(tensor) for name, tensor in workload.experts.items()}
        for name, parameter in experts.items():
            projection, *bias = name.rsplit("_bias", 1)
            setattr(layer.experts, f"{projection}_proj{'_bias' if bias else ''}", parameter)
        for name, weight in workload.packed.items():
            quantize_projection(layer.experts, f"{name}_proj", weight)
            del experts[name]
        return Block(
            forward=lambda x: layer(x).output,
            choose=lambda x: layer.router(x).experts,
            parameters={"gate": layer.router.weight, **experts},
            is_trainable=not workload.packed,
            is_fp8=case.fp8,
            label=f"moe_triton ({', '.join(filter(None, (chosen.name, 'fp8' if case.fp8 else case.format)))})",
        )

    return build
