"""The kernels of the experts, one after another on their own tensors: as stages, and each with any configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from moe_triton.backends.triton.experts import Problem
from moe_triton.benchmarking.stage import Stage
from moe_triton.kernel_stages import FORWARD, KERNELS, OP_OF, full_name, in_words
from moe_triton.records import ExpertCall
from moe_triton_kernels.launch import Config, target_of
from moe_triton_kernels.tiles import TileTables
from moe_triton_kernels.tools.shipped import TYPES, shipped_configs


class Chosen(Problem):
    """A problem whose kernels run with given configurations where there are some: operation -> configuration."""

    chosen: Mapping[str, Config] = {}

    def config(self, op: str) -> Config:
        return self.chosen.get(op) or super().config(op)


class ExpertKernels:
    """The experts' kernels over one call; every stage has the tensors that the stage before it made.

    grad_out [T, d]. All of them run once, with the configurations that `choose_config` gives; `problem.chosen`
    (operation -> configuration) holds for the calls that come later.
    """

    def __init__(self, call: ExpertCall, grad_out: Tensor) -> None:
        self.problem, self.grad_out = Chosen(call), grad_out
        self.tiles = self.tile_tables()
        self.a, self.h = self.up()
        self.rows = self.down()
        self.weighted_a, self.grad_h, self.shares = self.d_hidden()
        self.grad_rows = self.d_rows()

    def tile_tables(self) -> TileTables:
        return self.problem.tiles()

    def up(self) -> tuple[Tensor, Tensor]:
        return self.problem.up(self.tiles, keep_a=True, keep_h=True)

    def down(self) -> Tensor:
        return self.problem.down_rows(self.a, self.tiles)

    def combine(self) -> Tensor:
        return self.problem.combine(self.rows)

    def d_hidden(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.problem.d_hidden(self.grad_out, self.h, self.tiles)

    def d_router_weights(self) -> Tensor:
        return self.problem.d_router_weights(self.shares, self.grad_out, self.tiles)

    def d_weight_down(self) -> Tensor:
        return self.problem.d_down(self.grad_out, self.weighted_a)

    def d_weight_up(self) -> Tensor:
        return self.problem.d_gate_up(self.grad_h)

    def d_rows(self) -> Tensor:
        return self.problem.d_rows(self.grad_h, self.tiles)

    def combine_backward(self) -> Tensor:
        return self.problem.combine(self.grad_rows)

    def d_bias_rows(self) -> Tensor:
        return self.problem.d_gate_up_bias(self.grad_h)

    def d_bias_gathered(self) -> Tensor:
        return self.problem.d_down_bias(self.grad_out)

    def call(self, stage: str) -> Callable[[], object]:
        """The method that runs a stage of KERNELS once."""
        return getattr(self, stage)


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
