"""Peers with kernels of their own, for GPUs. Written from their public sources; each is measured where it is installed.

Experts-only peers get our gate and `plain_route` as their router. A peer whose weights lie otherwise works on a copy in
its own layout, made once and not timed. One that does not have the interface used here is named as such.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_triton.autograd.gate import run_gate
from moe_triton.benchmarking.cases import Workload
from moe_triton.benchmarking.providers.baseline import compiled_activation
from moe_triton.benchmarking.providers.block import (
    Block,
    Named,
    Parameter,
    Unavailable,
    require,
    require_swiglu,
    routed_block,
    share,
)
from moe_triton.records import LIMITED


def tensor(parameter: Parameter) -> Tensor:
    assert isinstance(parameter, Tensor)
    return parameter


def swap_halves(gate_up: Tensor) -> Tensor:
    """[E, 2n, d]: gate and up change places."""
    return torch.cat(gate_up.chunk(2, dim=1)[::-1], dim=1)


def interleave(gate_up: Tensor) -> Tensor:
    """[E, 2n, d], gate then up -> g0, u0, g1, u1, ..."""
    num_experts, rows, size = gate_up.shape
    return gate_up.view(num_experts, 2, rows // 2, size).transpose(1, 2).reshape(num_experts, rows, size)


def deinterleave(gate_up: Tensor) -> Tensor:
    num_experts, rows, size = gate_up.shape
    return gate_up.view(num_experts, rows // 2, 2, size).transpose(1, 2).reshape(num_experts, rows, size)


def require_normalised(workload: Workload, who: str) -> None:
    if workload.case.top_k == 1:
        raise Unavailable("not applicable", f"{who} normalises a lone weight to 1, where the others keep it")


def require_peer(workload: Workload, package: str, name: str, only_swiglu: str | None = None) -> None:
    """The package and a GPU; `only_swiglu` names what computes nothing else."""
    require(package, name)
    if workload.hidden.device.type != "cuda":
        raise Unavailable("not measured", f"{name} needs a GPU")
    if only_swiglu is not None:
        require_swiglu(workload.case, only_swiglu)


def members(who: str, module: str, *names: str) -> tuple[Any, ...]:
    """The named members of a peer's module."""
    try:
        found = importlib.import_module(module)
        return tuple(getattr(found, name) for name in names)
    except (ImportError, AttributeError) as error:
        raise changed(who, error) from error


def changed(who: str, error: Exception) -> Unavailable:
    return Unavailable("not measured", f"this {who} has another interface: {error}")


def scattermoe(workload: Workload) -> Block:
    """github.com/shawntan/scattermoe: `GLUMLP`, whose up projection has up in its first half and gate in its second."""
    case = workload.case
    require_peer(workload, "scattermoe", "ScatterMoE", "ScatterMoE's GLUMLP")
    (GLUMLP,) = members("ScatterMoE", "scattermoe.mlp", "GLUMLP")
    try:
        with torch.device("meta"):
            layer: Any = GLUMLP(case.hidden, case.intermediate, case.experts, case.top_k, activation=nn.SiLU())
        layer.experts.weight = nn.Parameter(swap_halves(workload.gate_up))
        layer.output_experts.weight = share(workload.down)
    except (TypeError, AttributeError) as error:
        raise changed("ScatterMoE", error) from error

    def run(x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        return layer(x, weights.to(x.dtype), experts)

    def unpack(named: Named) -> Named:
        return {**named, "gate_up": swap_halves(tensor(named["gate_up"]))}

    return routed_block(workload, run, layer.experts.weight, layer.output_experts.weight, unpack)


def liger(workload: Workload) -> Block:
    """github.com/linkedin/Liger-Kernel: `LigerFusedMoEFunction`, over the very weights of the workload."""
    require_peer(workload, "liger_kernel", "Liger-Kernel", "Liger-Kernel's fused MoE")
    (LigerFusedMoEFunction,) = members("Liger-Kernel", "liger_kernel.ops.fused_moe", "LigerFusedMoEFunction")
    gate_up, down = share(workload.gate_up), share(workload.down)

    def run(x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        return LigerFusedMoEFunction.apply(x, gate_up, down, experts.int(), weights.to(x.dtype))

    return routed_block(workload, run, gate_up, down)


def sonicmoe(workload: Workload) -> Block:
    """github.com/Dao-AILab/sonic-moe: the functional layer, router included; gate and up rows alternate."""
    case = workload.case
    require_peer(workload, "sonicmoe", "SonicMoE", "this adapter of SonicMoE")
    require_normalised(workload, "SonicMoE")
    (moe_TC_softmax_topk_layer,) = members("SonicMoE", "sonicmoe", "moe_TC_softmax_topk_layer")
    (ActivationType,) = members("SonicMoE", "sonicmoe.enums", "ActivationType")
    gate, down = share(workload.gate), share(workload.down)
    gate_up = nn.Parameter(interleave(workload.gate_up))

    def forward(x: Tensor) -> Tensor:
        stream = torch.cuda.current_stream().cuda_stream
        out, _, _ = moe_TC_softmax_topk_layer(
            x, gate, gate_up.permute(1, 2, 0), None, down.permute(1, 2, 0), None, case.top_k, stream,
            ActivationType.SWIGLU, not torch.is_grad_enabled(),
        )  # fmt: skip
        return out

    def unpack(named: Named) -> Named:
        return {**named, "gate_up": deinterleave(tensor(named["gate_up"]))}

    return Block(
        forward=forward,
        choose=lambda x: F.linear(x, gate).topk(case.top_k, dim=-1).indices,
        parameters={"gate": gate, "gate_up": gate_up, "down": down},
        unpack=unpack,
    )


def megablocks(workload: Workload) -> Block:
    """github.com/databricks/megablocks: dMoE with the block-sparse GLU; w1 and v1 [E n, d], w2 [E n, d]."""
    case = workload.case
    require_peer(workload, "megablocks", "MegaBlocks", "MegaBlocks' GLU")
    if case.dtype not in ("bfloat16", "float16"):
        raise Unavailable("not applicable", "MegaBlocks' block-sparse products are for bfloat16 and float16")
    if case.intermediate % 128:
        raise Unavailable("not applicable", "MegaBlocks wants an intermediate size that is a multiple of 128")
    (Arguments,) = members("MegaBlocks", "megablocks.layers.arguments", "Arguments")
    (dMoE,) = members("MegaBlocks", "megablocks.layers.dmoe", "dMoE")
    try:
        layer = dMoE(
            Arguments(
                hidden_size=case.hidden,
                ffn_hidden_size=case.intermediate,
                moe_num_experts=case.experts,
                moe_top_k=case.top_k,
                moe_normalize_expert_weights=1 if case.top_k > 1 else None,
                moe_loss_weight=0.0,
                activation_fn=F.silu,
                mlp_type="glu",
                mlp_impl="sparse",
                bias=False,
                return_bias=False,
                fp16=case.dtype == "float16",
                bf16=case.dtype == "bfloat16",
                device=workload.hidden.device,
            )
        )
        mlp, router = layer.experts.mlp, layer.router.layer
        for name, part in zip(("w1", "v1"), workload.gate_up.chunk(2, dim=1), strict=True):
            setattr(mlp, name, nn.Parameter(part.reshape(-1, case.hidden)))
        mlp.w2 = nn.Parameter(workload.down.transpose(1, 2).reshape(-1, case.hidden))
        router.weight = share(workload.gate)
    except (TypeError, AttributeError) as error:
        raise changed("MegaBlocks", error) from error

    def forward(x: Tensor) -> Tensor:
        out = layer(x[None])
        return (out[0] if isinstance(out, tuple) else out)[0]

    def unpack(named: Named) -> Named:
        w1, v1, w2 = (tensor(named[name]).view(case.experts, -1, case.hidden) for name in ("w1", "v1", "w2"))
        return {"gate": named["gate"], "gate_up": torch.cat((w1, v1), dim=1), "down": w2.transpose(1, 2)}

    return Block(
        forward=forward,
        choose=lambda x: F.linear(x, router.weight).softmax(-1).topk(case.top_k, dim=-1).indices,
        parameters={"gate": router.weight, "w1": mlp.w1, "v1": mlp.v1, "w2": mlp.w2},
        unpack=unpack,
    )


def triton_kernels(workload: Workload) -> Block:
    """github.com/triton-lang/triton, python/triton_kernels: top-k, gathered and scattered products; inference only.

    Its fused SwiGLU is gpt-oss's; plain SwiGLU runs as two products with a compiled activation between them.
    """
    case = workload.case
    require_peer(workload, "triton_kernels", "triton_kernels")
    require_normalised(workload, "triton_kernels")
    if case.activation not in ("swiglu", "gpt_oss"):
        raise Unavailable("not applicable", "triton_kernels is measured with swiglu and gpt_oss")
    who = "triton_kernels"
    FnSpecs, FusedActivation, matmul = members(who, "triton_kernels.matmul", "FnSpecs", "FusedActivation", "matmul")
    (swiglu_fn,) = members(who, "triton_kernels.swiglu", "swiglu_fn")
    (make_ragged_tensor_metadata,) = members(who, "triton_kernels.tensor", "make_ragged_tensor_metadata")
    (topk,) = members(who, "triton_kernels.topk", "topk")
    is_fused = case.activation == "gpt_oss"
    gate_up = interleave(workload.gate_up) if is_fused else workload.gate_up
    up_bias, down_bias = workload.gate_up_bias, workload.down_bias
    if up_bias is not None and down_bias is not None:
        up_bias = (interleave(up_bias[:, :, None])[:, :, 0] if is_fused else up_bias).float()
        down_bias = down_bias.float()
    specs = FnSpecs("swiglu", swiglu_fn, ("alpha", "limit"), reduction_n=2)
    limit, alpha = LIMITED["gpt_oss"]
    fused = FusedActivation(specs, (alpha, limit)) if is_fused else None
    activation = compiled_activation(case.activation, "cuda")

    def forward(x: Tensor) -> Tensor:
        chosen = topk(run_gate(x, workload.gate, None)[0], case.top_k, apply_softmax=True)
        metadata = chosen.mask_metadata
        rows = metadata.col_sorted_indx
        ragged = make_ragged_tensor_metadata(metadata.col_sum, rows.shape[0])
        h = matmul(
            x, gate_up.transpose(1, 2), up_bias, a_ragged_metadata=ragged, gather_indx=rows // case.top_k,
            fused_activation=fused,
        )  # fmt: skip
        a = h if is_fused else activation(h)
        y = matmul(a, workload.down.transpose(1, 2), down_bias, a_ragged_metadata=ragged, scatter_indx=rows)
        return torch.bmm(chosen.vals[:, None].to(y.dtype), y.view(case.tokens, case.top_k, -1))[:, 0]

    return Block(
        forward=forward,
        choose=lambda x: topk(run_gate(x, workload.gate, None)[0], case.top_k, apply_softmax=True).indx,
        parameters={},
        is_trainable=False,
    )
