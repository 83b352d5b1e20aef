"""What one writes without a kernel: gather, `F.grouped_mm`, a compiled activation, weighted sum."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton.benchmarking.cases import Workload
from moe_triton.benchmarking.providers.block import Block, Unavailable, routed_block, share
from moe_triton.reference import activate


@cache
def compiled_activation(activation: str, device_type: str) -> Callable[[Tensor], Tensor]:
    """[S, 2n] -> [S, n]; compiled on a GPU. On a CPU it is left as it is: there a compiler may be missing."""

    def run(h: Tensor) -> Tensor:
        return activate(h, activation)

    return torch.compile(run, dynamic=True) if device_type == "cuda" else run


def grouped_mm(workload: Workload) -> Block:
    """Sorts the choices by expert, gathers their rows, and multiplies by two grouped products."""
    case, device = workload.case, workload.hidden.device
    if not hasattr(F, "grouped_mm"):
        raise Unavailable("too old", "this torch has no F.grouped_mm")
    row_bytes = case.torch_dtype.itemsize * torch.tensor([case.hidden, case.intermediate])
    if bool((row_bytes % 16 != 0).any()):
        raise Unavailable("not applicable", "F.grouped_mm wants rows of a multiple of 16 bytes")
    dtypes = ("bfloat16",) if device.type == "cuda" else ("bfloat16", "float32")
    if case.dtype not in dtypes:
        raise Unavailable("not applicable", f"F.grouped_mm takes {' and '.join(dtypes)} on this device")
    if case.bias:
        raise Unavailable("not applicable", "this baseline has no biases")
    gate_up, down = share(workload.gate_up), share(workload.down)
    activation = compiled_activation(case.activation, device.type)

    def run(x_Td: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        expert_S, slot_S = experts_TK.reshape(-1).sort(stable=True)
        edges = torch.arange(case.experts, device=device)
        ends_E = torch.searchsorted(expert_S, edges, right=True, out_int32=True)
        h = F.grouped_mm(x_Td[slot_S // case.top_k], gate_up.transpose(1, 2), offs=ends_E)
        y_Sd = F.grouped_mm(activation(h), down.transpose(1, 2), offs=ends_E)
        y_TKd = torch.empty_like(y_Sd).index_copy(0, slot_S, y_Sd).view(case.tokens, case.top_k, -1)
        return torch.bmm(weights_TK[:, None].to(y_TKd.dtype), y_TKd)[:, 0]

    label = "gather + F.grouped_mm" + (" + compiled activation" if device.type == "cuda" else "")
    return routed_block(workload, run, gate_up, down, label=label)
