"""DeepSpeed's MoE layer on one process."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_triton.benchmarking.cases import Case, Workload
from moe_triton.benchmarking.providers.block import Block, require, require_swiglu, share


class PlainExpert(nn.Module):
    """One SwiGLU expert as two linear layers, the module that DeepSpeed's layer is given."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


def deepspeed_moe(workload: Workload) -> Block:
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


def quiet() -> contextlib.AbstractContextManager[object]:
    """DeepSpeed prints while it is imported and while its layers are built."""
    return contextlib.redirect_stdout(io.StringIO())


def start_one_process() -> None:
    """DeepSpeed's layer wants a process group; here it is of this process alone."""
    import deepspeed.comm

    without_compiled_sums()
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    deepspeed.comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def without_compiled_sums() -> None:
    """Keep DeepSpeed from compiling half a minute for sums in shared memory, which only inference over ranks uses."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def deepspeed_layer(case: Case) -> nn.Module:
    """The layer on the meta device, in a process group of this one process."""
    with quiet():
        from deepspeed.moe.layer import MoE as DeepSpeedMoE

        start_one_process()
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
