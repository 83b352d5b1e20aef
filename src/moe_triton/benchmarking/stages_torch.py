"""The experts of the torch backend as stages: one forward and one backward, since nothing smaller runs apart."""

from __future__ import annotations

from torch import Tensor

from moe_triton import runtime
from moe_triton.benchmarking.stage import Stage
from moe_triton.records import ExpertCall, Wanted

EMULATED = "experts_fp8, which emulates: operands rounded to e4m3 and multiplied in fp32"
INSIDE = "inside `experts`, block by block: not measured apart on this machine"


def expert_stages(call: ExpertCall, grad_out: Tensor) -> list[Stage]:
    """The stages of a call; grad_out [T, d]."""
    backend = runtime.experts_backend("torch", call.hidden.device, fp8=call.spec.fp8)
    _, h = backend.experts_forward(call, True)
    wanted = Wanted().of(call.parameters)
    weights = ("d_weight_down", "d_weight_up") if wanted.down else ()
    name = "experts_cpu" if call.hidden.device.type == "cpu" else "experts_device"
    name = EMULATED if call.spec.fp8 else name
    return [
        Stage(name="up, down, combine", note=INSIDE),
        Stage(
            name="experts",
            kernel=name,
            floors=("up", "down", "combine"),
            call=lambda: backend.experts_forward(call, True),
        ),
        Stage(name=f"d_hidden, {'d_weight, ' if weights else ''}d_rows, combine", is_backward=True, note=INSIDE),
        Stage(
            name="experts",
            is_backward=True,
            kernel=name,
            floors=("d_hidden", "d_router_weights", *weights, "d_rows", "combine"),
            call=lambda: backend.experts_backward(call, grad_out, h, wanted),
        ),
    ]
