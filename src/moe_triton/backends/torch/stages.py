"""The experts of the torch backend as stages: one forward and one backward, since nothing smaller runs apart."""

from __future__ import annotations

from torch import Tensor

from moe_triton.backends.stages import Stage
from moe_triton.backends.torch.experts import experts_backward, experts_forward
from moe_triton.records import Dispatch, ExpertSpec

INSIDE = "inside `experts`, block by block: not measured apart on this machine"


def expert_stages(
    hidden: Tensor,
    weights: Tensor,
    plan: Dispatch,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    spec: ExpertSpec,
    grad_out: Tensor,
) -> list[Stage]:
    """Shapes as in `moe_triton.reference.moe_mlp`; grad_out [T, d]."""
    index = (plan.offsets, plan.source, plan.position)
    biases = (gate_up_bias, down_bias)
    _, h = experts_forward(hidden, weights, *index, gate_up_proj, down_proj, *biases, spec, True)
    needs = (True, True, True, True, gate_up_bias is not None, down_bias is not None)
    name = "experts_cpu" if hidden.device.type == "cpu" else "experts_device"
    return [
        Stage(name="up, down, combine", note=INSIDE),
        Stage(
            name="experts",
            kernel=name,
            floors=("up", "down", "combine"),
            call=lambda: experts_forward(hidden, weights, *index, gate_up_proj, down_proj, *biases, spec, True),
        ),
        Stage(name="d_hidden, d_weight, d_rows, combine", is_backward=True, note=INSIDE),
        Stage(
            name="experts",
            is_backward=True,
            kernel=name,
            floors=("d_hidden", "d_router_weights", "d_weight_down", "d_weight_up", "d_rows", "combine"),
            call=lambda: experts_backward(
                grad_out, hidden, h, weights, *index, gate_up_proj, down_proj, *biases, spec, needs
            ),
        ),
    ]
