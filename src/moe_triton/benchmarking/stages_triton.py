"""The kernels of the experts, one after another on their own tensors: as stages, and each with any configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from moe_triton.backends.triton.problem import Problem
from moe_triton.benchmarking.stage import Stage
from moe_triton.kernel_stages import FORWARD, KERNELS, OP_OF, full_name, in_words
from moe_triton.records import ExpertCall
from moe_triton_kernels.gluon.schedules import why_unsupported
from moe_triton_kernels.launch import Config, target_of
from moe_triton_kernels.operands import PerExpert
from moe_triton_kernels.tools.shipped import TYPES, shipped_configs


class Chosen(Problem):
    """A problem whose kernels run with given configurations where there are some: operation -> configuration."""

    chosen: Mapping[str, Config] = {}

    def config(self, op: str, weight: PerExpert | None = None) -> Config:
        return self.chosen.get(op) or super().config(op, weight)

    def why_plain(self, stage: str, config: Config) -> str | None:
        """Why a stage would run its plain kernel though its configuration names a schedule; None: it would not."""
        if config.gluon is None:
            return None
        n, d, spec = self.size_n, self.size_d, self.spec
        operands: dict[str, tuple[int, PerExpert, PerExpert | None, dict[str, Any]]] = {
            "up": (d, self.gate_up, self.gate_up_bias, {"size_columns": n, "projections": 2 if spec.is_gated else 1}),
            "down": (n, self.down, self.down_bias, {"size_columns": d}),
            "d_hidden": (d, self.down.transposed(), None, {"size_columns": n, "derivative": self.activation}),
            "d_rows": (self.call.width, self.gate_up.transposed(), None, {"size_columns": d}),
        }
        if stage not in operands:
            return f"{stage} has no warp-specialized kernel"
        size_k, weight, bias, sizes = operands[stage]
        rows = self.hidden.new_empty(max(1, self.num_rows), size_k)
        return why_unsupported(config.gluon, rows, weight, bias, **sizes)


class ExpertKernels:
    """The experts' kernels over one call; every stage has the tensors that the stage before it made.

    grad_out [T, d]. All of them run once, with the configurations that `choose_config` gives; `problem.chosen`
    (operation -> configuration) holds for the calls that come later.
    """

    def __init__(self, call: ExpertCall, grad_out: Tensor) -> None:
        problem = self.problem = Chosen(call)
        self.grad_out, tiles = grad_out, problem.tiles()

        def up() -> tuple[Tensor, Tensor]:
            return problem.up(tiles, keep_a=True, keep_h=True)

        def down() -> Tensor:
            return problem.down_rows(self.a, tiles)

        def d_hidden() -> tuple[Tensor, Tensor, Tensor]:
            return problem.d_hidden(grad_out, self.h, tiles)

        def d_rows() -> Tensor:
            return problem.d_rows(self.grad_h, tiles)

        self.a, self.h = up()
        rows = down()
        self.weighted_a, self.grad_h, shares = d_hidden()
        grad_rows = d_rows()
        self.calls: dict[str, Callable[[], object]] = {
            "tile_tables": problem.tiles,
            "up": up,
            "down": down,
            "combine": lambda: problem.combine(rows),
            "d_hidden": d_hidden,
            "d_router_weights": lambda: problem.d_router_weights(shares, grad_out, tiles),
            "d_weight_down": lambda: problem.d_down(grad_out, self.weighted_a),
            "d_weight_up": lambda: problem.d_gate_up(self.grad_h),
            "d_rows": d_rows,
            "combine_backward": lambda: problem.combine(grad_rows),
            "d_bias_rows": lambda: problem.d_gate_up_bias(self.grad_h),
            "d_bias_gathered": lambda: problem.d_down_bias(grad_out),
        }

    def call(self, stage: str) -> Callable[[], object]:
        """What runs a stage of KERNELS once."""
        return self.calls[stage]


def shipped_for(problem: Problem, op: str) -> list[Config]:
    """Every configuration that ships for an operation on the problem's device, in its dtype (fp16 shares bf16's)."""
    architecture = target_of(problem.hidden.device).architecture
    name, dtype = full_name(op, problem.spec.is_gated), TYPES.get(problem.hidden.dtype, "bf16")
    return [s.config for s in shipped_configs(architecture) if s.op == name and s.dtype == dtype]


def expert_stages(call: ExpertCall, grad_out: Tensor) -> list[Stage]:
    """The kernels in the order in which `experts_forward` and `experts_backward` run them; grad_out [T, d]."""
    opened = ExpertKernels(call, grad_out)
    absent = {"d_bias_rows": call.parameters.gate_up_bias is None, "d_bias_gathered": call.parameters.down_bias is None}
    return [
        Stage(
            name=name.removesuffix("_backward"),
            is_backward=name not in FORWARD,
            kernel=kernel,
            config=in_words(opened.problem.config(OP_OF[name])) if name in OP_OF else "",
            floors=(name.removesuffix("_backward"),),
            call=opened.call(name),
        )
        for name, kernel in KERNELS.items()
        if not absent.get(name)
    ]
