"""Who is measured: our layer and its peers, each as a whole MoE block over the very same weights.

A block takes hidden states [T, d] to hidden states [T, d], router included.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_triton import runtime
from moe_triton.benchmarking.cases import Case, Workload
from moe_triton.benchmarking.limits import SMALL_TOKENS
from moe_triton.layers import MoE

Parameter = Tensor | list[Tensor]  # one tensor, or one per expert
COPIED_BYTES = 8 << 30  # of weights that batched_mm may gather


class Unavailable(Exception):
    """A provider that cannot be measured here: `status` in two words and the reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Block:
    """A provider, ready to run.

    forward     [T, d] -> [T, d], differentiable in the hidden states and in every parameter
    choose      [T, d] -> the experts that its own router chooses, [T, K]
    parameters  "gate" [E, d], "gate_up", "down" and biases as in `Workload`, or one tensor per expert
    label       how it is shown, where that is only known now
    """

    forward: Callable[[Tensor], Tensor]
    choose: Callable[[Tensor], Tensor]
    parameters: Mapping[str, Parameter]
    label: str | None = None

    def leaves(self) -> list[Tensor]:
        """The parameters as one flat list."""
        groups = (value if isinstance(value, list) else [value] for value in self.parameters.values())
        return [tensor for group in groups for tensor in group]

    def grouped(self, tensors: list[Tensor]) -> dict[str, Parameter]:
        """A flat list in the order of `leaves` by name again."""
        rest, named = list(tensors), {}
        for name, value in self.parameters.items():
            size = len(value) if isinstance(value, list) else 1
            named[name] = rest[:size] if isinstance(value, list) else rest[0]
            del rest[:size]
        return named


@dataclass(frozen=True, kw_only=True)
class Provider:
    """`build` makes the block or raises `Unavailable`. `notes`: what differs from the other blocks."""

    label: str
    build: Callable[[Workload], Block]
    is_ours: bool = False
    notes: str = field(default="")


def share(tensor: Tensor) -> nn.Parameter:
    """A parameter over the workload's own memory."""
    return nn.Parameter(tensor)


def require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Unavailable("not installed", f"{package} is not installed")


def require_swiglu(case: Case, who: str) -> None:
    if case.activation != "swiglu" or case.bias:
        raise Unavailable("not applicable", f"{who} computes swiglu without biases")


def require_few_copies(case: Case) -> None:
    """batched_mm copies the weights of every choice of every token."""
    size = case.tokens * case.top_k * case.weight_elements * case.torch_dtype.itemsize
    if case.tokens > SMALL_TOKENS:
        raise Unavailable("not applicable", f"copies each token's experts: only for T <= {SMALL_TOKENS} tokens")
    if size > COPIED_BYTES:
        raise Unavailable("not applicable", f"copies each token's experts: {size / 2**30:.0f} GiB of weights here")


# Ours -----------------------------------------------------------------------------------------------------------------


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


# transformers ---------------------------------------------------------------------------------------------------------


def transformers(implementation: str) -> Callable[[Workload], Block]:
    """The sparse block of a Qwen3-MoE model made from its config, with one of transformers' experts implementations."""

    def build(workload: Workload) -> Block:
        case = workload.case
        require("transformers")
        require_swiglu(case, "the Qwen3-MoE block")
        if implementation == "batched_mm":
            require_few_copies(case)
        try:
            from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
            from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeSparseMoeBlock
        except ImportError as error:
            raise Unavailable("too old", f"this transformers has no stacked Qwen3-MoE experts: {error}") from error
        config = Qwen3MoeConfig(
            hidden_size=case.hidden,
            moe_intermediate_size=case.intermediate,
            num_experts=case.experts,
            num_experts_per_tok=case.top_k,
            norm_topk_prob=case.top_k > 1,
            hidden_act="silu",
            experts_implementation=implementation,
        )
        with torch.device("meta"):
            block = Qwen3MoeSparseMoeBlock(config)
        experts: Qwen3MoeExperts = block.experts
        block.gate.weight = share(workload.gate)
        experts.gate_up_proj = share(workload.gate_up)
        experts.down_proj = share(workload.down)
        return Block(
            forward=lambda x: block(x[None])[0],
            choose=lambda x: block.gate(x)[2],
            parameters={"gate": block.gate.weight, "gate_up": experts.gate_up_proj, "down": experts.down_proj},
        )

    return build


# DeepSpeed ------------------------------------------------------------------------------------------------------------


class PlainExpert(nn.Module):
    """One SwiGLU expert as two linear layers, the module that DeepSpeed's layer is given."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


def deepspeed(workload: Workload) -> Block:
    """`deepspeed.moe.layer.MoE` on one process, dropless, without noise or random token selection."""
    case = workload.case
    require("deepspeed")
    require_swiglu(case, "the expert module of this benchmark")
    layer: Any = deepspeed_layer(case)
    gate = layer.deepspeed_moe.gate.wg
    gate.weight = share(workload.gate)
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    for e, expert in enumerate(experts):
        expert.gate_up_proj.weight = share(workload.gate_up[e])
        expert.down_proj.weight = share(workload.down[e])

    def choose(x: Tensor) -> Tensor:
        logits = F.linear(x.float(), gate.weight.float())
        return logits.softmax(-1).topk(case.top_k, dim=-1).indices

    return Block(
        forward=lambda x: layer(x)[0],
        choose=choose,
        parameters={
            "gate": gate.weight,
            "gate_up": [expert.gate_up_proj.weight for expert in experts],
            "down": [expert.down_proj.weight for expert in experts],
        },
    )


def deepspeed_layer(case: Case) -> nn.Module:
    """The layer on the meta device, in a process group of this one process."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):  # it prints while it is imported and built
        import deepspeed.comm
        from deepspeed.moe.layer import MoE as DeepSpeedMoE

        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        deepspeed.comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        with torch.device("meta"):
            layer = DeepSpeedMoE(
                case.hidden,
                PlainExpert(case.hidden, case.intermediate),
                num_experts=case.experts,
                k=case.top_k,
                min_capacity=0,
                drop_tokens=False,
                use_rts=False,
                top2_2nd_expert_sampling=False,
            )
        layer.set_deepspeed_parallelism()
    return layer


PROVIDERS = {
    "auto": Provider(label="moe_triton (auto)", build=ours("auto"), is_ours=True),
    "triton": Provider(label="moe_triton (triton)", build=ours("triton"), is_ours=True),
    "torch": Provider(label="moe_triton (torch)", build=ours("torch"), is_ours=True),
    "hf-eager": Provider(label="transformers eager", build=transformers("eager")),
    "hf-grouped_mm": Provider(label="transformers grouped_mm", build=transformers("grouped_mm")),
    "hf-batched_mm": Provider(label="transformers batched_mm", build=transformers("batched_mm")),
    "deepspeed": Provider(
        label="DeepSpeed MoE",
        build=deepspeed,
        notes="pads every expert to the fullest one",
    ),
}


def default_names(case: Case, device: torch.device) -> list[str]:
    """What is measured when nobody says: our backends first, then every peer that suits the shape."""
    own = ["triton", "torch"] if device.type == "cuda" else ["auto"]
    batched = ["hf-batched_mm"] if case.tokens <= SMALL_TOKENS else []
    return [*own, "hf-eager", "hf-grouped_mm", *batched, "deepspeed"]
