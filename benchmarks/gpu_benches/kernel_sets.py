"""The kernels that are timed one by one: each is called on tensors that are ready, and makes its outputs.

training    what a training step launches, the gate's products among it
few_tokens  routing and dispatch of decoding, in one launch and in several; a table of addresses
fp8         products of codes, and what makes the codes
adapters    LoRA's narrow products, their gradients, and the experts' products with an adapter in them
quantised   products over quantised projections, and decoding these to memory
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from gpu_checks.setting import Skipped
from torch import Tensor

from moe_triton.backends.triton import dispatch as dispatching
from moe_triton.backends.triton import gate as gating
from moe_triton.backends.triton import routing
from moe_triton.backends.triton.experts_fp8 import runs_kernels
from moe_triton.backends.triton.parameters import Factors
from moe_triton.backends.triton.problem import Problem
from moe_triton.benchmarking.cases import Case, Workload
from moe_triton.benchmarking.stages_fp8 import fp8_calls
from moe_triton.benchmarking.stages_triton import ExpertKernels
from moe_triton.dispatch import dispatch
from moe_triton.kernel_stages import KERNELS, OVER_CODES
from moe_triton.records import ExpertCall, RouterSpec
from moe_triton_kernels import gate
from moe_triton_kernels.address_tables import fill_table
from moe_triton_kernels.fp8_d_weight import tile_offsets
from moe_triton_kernels.mxfp8 import quantize_mx
from moe_triton_kernels.operands import PerExpert
from moe_triton_kernels.permutation import permute
from moe_triton_kernels.quantized import decode
from moe_triton_kernels.tiles import TileTables, tile_tables
from moe_triton_kernels.tools.floors import FLOORS, FP8_FLOORS, Work

NARROW = (torch.bfloat16, torch.float16)  # what the gate's kernels take
RANK = 16  # of adapters: that of `Shape`
TWO_HALVES = (0, 1)  # of a gradient of the logits, in 16 bits
Run = Callable[[], object]


class Kernel(NamedTuple):
    """What is timed, what it has to compute and to move, and of what type its products are ("bf16", "fp8", ...)."""

    call: Run
    work: Work
    dtype: str


def with_floors(case: Case, calls: Mapping[str, Run]) -> dict[str, Kernel]:
    """The calls and their floors. "gate_forward, ours" has the floor of what stands before the comma."""
    shape = case.shape
    return {name: Kernel(call, FLOORS[name.partition(",")[0]](shape), shape.dtype) for name, call in calls.items()}


def router_of(case: Case) -> RouterSpec:
    return RouterSpec(top_k=case.top_k, normalize=case.top_k > 1)


def routed(workload: Workload) -> ExpertCall:
    """The call of the experts for the tokens as the workload's gate routes them."""
    logits = workload.hidden.float() @ workload.gate.float().T
    experts, weights, *_ = routing.route_forward(logits, router_of(workload.case), None, None, None)
    return workload.call(weights, dispatch(experts, workload.case.experts, backend="triton"))


# Training -------------------------------------------------------------------------------------------------------------


def training(workload: Workload) -> dict[str, Kernel]:
    case, router = workload.case, router_of(workload.case)
    logits = workload.hidden.float() @ workload.gate.float().T
    experts, weights, _, score_sums, z_sum = routing.route_forward(logits, router, None, None, None)
    opened = ExpertKernels(workload.call(weights, dispatch(experts, case.experts, backend="triton")), workload.grad_out)
    calls: dict[str, Run] = {
        "topk": lambda: routing.route_forward(logits, router, None, None, None),
        "permutation": lambda: permute(experts, case.experts),
        **{name: opened.call(name) for name in KERNELS if name in FLOORS and (case.bias or "bias" not in name)},
        "topk_backward": lambda: routing.route_backward(weights, score_sums, z_sum, logits, experts, router),
    }
    if case.torch_dtype in NARROW:
        calls |= gate_calls(workload.hidden, workload.gate, logits, workload.grad_out)
    return with_floors(case, calls)


def gate_calls(hidden: Tensor, weight: Tensor, grad_logits: Tensor, grad_hidden: Tensor) -> dict[str, Run]:
    """The gate's products as they run, and those that torch does there also by our kernel; all in 16 bits.

    hidden, grad_hidden [T, d], weight [E, d]; grad_logits fp32 [T, E].
    """
    dtype = hidden.dtype
    rows = gate.split(grad_logits, dtype, TWO_HALVES, stacked=False)
    columns = gate.split(weight.float(), dtype, (0, 0), stacked=True)
    return {
        "gate_forward": lambda: gating.product(hidden, weight.mT, torch.float32),
        "gate_forward, ours": lambda: gate.product(hidden, weight.mT, torch.float32),
        "gate_split": lambda: gate.split(grad_logits, dtype, TWO_HALVES, stacked=False),
        "gate_d_hidden": lambda: gating.product(rows, columns, dtype, grad_hidden),
        "gate_d_weight": lambda: gating.product(rows.mT, hidden, torch.float32),
        "gate_d_weight, ours": lambda: gate.product(rows.mT, hidden, torch.float32),
    }


# Few tokens -----------------------------------------------------------------------------------------------------------


def few_tokens(workload: Workload) -> dict[str, Kernel]:
    """What one launch does instead of several has its own floor, so it is the times that are to be compared."""
    case, router, hidden = workload.case, router_of(workload.case), workload.hidden
    logits = hidden.float() @ workload.gate.float().T
    experts = routing.route_forward(logits, router, None, None, None)[0]
    offsets = dispatch(experts, case.experts, backend="triton").offsets
    addresses = tuple(matrix.data_ptr() for matrix in workload.down)
    calls: dict[str, Run] = {
        "small_route": lambda: routing.route_and_dispatch(logits, router, None, None, None),
        "topk": lambda: routing.route_forward(logits, router, None, None, None),
        "small_dispatch": lambda: dispatching.build_small_dispatch(experts, case.experts),
        "permutation": lambda: permute(experts, case.experts),
        "tile_tables": lambda: tile_tables(offsets, experts.numel()),
        "address_table": lambda: fill_table(addresses, hidden.device),
    }
    for name in ("small_route", "small_dispatch"):
        if calls[name]() is None:  # too many tokens for one program
            del calls[name]
    if case.torch_dtype in NARROW:
        calls["gate_forward"] = lambda: gating.product(hidden, workload.gate.mT, torch.float32)
    return with_floors(case, calls)


# fp8 ------------------------------------------------------------------------------------------------------------------


# kernel -> its stage in `stages_fp8`
FP8_STAGES = {
    **{f"fp8_{name}": name for name in ("up", "down", "d_hidden", "d_rows", "d_weight_down", "d_weight_up")},
    "quantize_rows": "quantize X",
    "quantize_columns": "quantize gathered X",
    "quantize_both": "quantize dO",
    "quantize_weight": "quantize W1",
    "quantize_weight_down": "quantize W2",
}
FP8_BIASES = {f"fp8_{name}": name for name in ("d_bias_rows", "d_bias_gathered")}  # where the experts have biases


def fp8(workload: Workload) -> dict[str, Kernel]:
    """Raises Skipped where the GPU does not multiply codes."""
    if not runs_kernels(workload.hidden.device):
        raise Skipped("this GPU has no products of fp8")
    shape, call = workload.case.shape, routed(workload)
    problem, stages = fp8_calls(replace(call, spec=replace(call.spec, fp8=True)), workload.grad_out)
    offsets, hidden = problem.tiles().offsets, problem.hidden
    read = FP8_STAGES if problem.gate_up_bias is None else FP8_STAGES | FP8_BIASES
    calls: dict[str, Run] = {
        **{name: stages[stage] for name, stage in read.items()},
        "quantize_mx": lambda: quantize_mx(hidden),
        "tile_offsets": lambda: tile_offsets(offsets),
    }
    return {
        name: Kernel(call, FP8_FLOORS[name](shape), "fp8" if name.startswith("fp8") else shape.dtype)
        for name, call in calls.items()
    }


# Adapters -------------------------------------------------------------------------------------------------------------


class Narrowed(Problem):
    """The narrow products of adapters are made once, so that a wide one is timed without them."""

    def __init__(self, call: ExpertCall) -> None:
        super().__init__(call)
        self.narrowed: dict[int, tuple[Tensor, Tensor]] = {}

    def _narrow(
        self, x: Tensor, lora: Factors, weight: PerExpert, tiles: TileTables, *, gathered: bool = False
    ) -> Tensor:
        if id(x) not in self.narrowed:
            self.narrowed[id(x)] = x, super()._narrow(x, lora, weight, tiles, gathered=gathered)
        return self.narrowed[id(x)][1]


def adapted(workload: Workload) -> ExpertCall:
    """The routed call with adapters of rank RANK."""
    call, case = routed(workload), workload.case
    sizes = {
        "gate_up_lora_a": (RANK, case.hidden), "gate_up_lora_b": (case.expert_rows, RANK),
        "down_lora_a": (RANK, case.intermediate), "down_lora_b": (case.hidden, RANK),
    }  # fmt: skip
    factors = {name: workload.down.new_empty(case.experts, *size).normal_() for name, size in sizes.items()}
    return replace(call, parameters=call.parameters._replace(**factors))


def adapters(workload: Workload) -> dict[str, Kernel]:
    """Each wide product has the floor that it has without an adapter."""
    case, grad_out = workload.case, workload.grad_out
    call = adapted(workload)
    problem, plain = Narrowed(call), Problem(call)
    tiles, hidden = problem.tiles(), problem.hidden
    a, h = problem.up(tiles, keep_a=True, keep_h=True)
    problem.down_rows(a, tiles)
    down_u = problem.u_down(grad_out, tiles)
    assert down_u is not None
    weighted_a, grad_h, _ = problem.d_hidden(grad_out, h, tiles, down_u)
    gate_up_u = problem.u_gate_up(grad_h, tiles)
    assert gate_up_u is not None
    calls: dict[str, Run] = {
        "narrow_gathered": lambda: plain.t_gate_up(tiles),
        "narrow_ordered": lambda: plain.t_down(a, tiles),
        "d_adapter_gathered": lambda: plain._d_factor(gate_up_u, hidden),
        "d_adapter_ordered": lambda: plain._d_factor(down_u, weighted_a, gathers=False),
        "up, adapted": lambda: problem.up(tiles, keep_a=True, keep_h=True),
        "down, adapted": lambda: problem.down_rows(a, tiles),
        "d_hidden, adapted": lambda: problem.d_hidden(grad_out, h, tiles, down_u),
        "d_rows, adapted": lambda: problem.d_rows(grad_h, tiles, gate_up_u),
    }
    return with_floors(case, calls)


# Quantised projections ------------------------------------------------------------------------------------------------


def quantized(workload: Workload) -> dict[str, Kernel]:
    """The products, over codes or, for many rows, over numbers that were decoded to memory before; and the decoding."""
    case, dtype = workload.case, workload.hidden.dtype
    call = routed(workload)
    opened = ExpertKernels(replace(call, parameters=call.parameters._replace(**workload.packed)), workload.grad_out)
    problem = opened.problem
    products: dict[str, Run] = {name: opened.call(name) for name in OVER_CODES}
    over_numbers = {name: run for name, run in products.items() if name in problem.decoded}
    over_codes = {name: run for name, run in products.items() if name not in problem.decoded}
    decoding: dict[str, Run] = {
        "decode": lambda: decode(problem.gate_up_operand(), dtype),
        "decode_down": lambda: decode(problem.down_operand(), dtype),
    }
    return with_floors(replace(case, format=None), over_numbers) | with_floors(case, over_codes | decoding)
