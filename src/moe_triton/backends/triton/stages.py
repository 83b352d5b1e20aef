"""The kernels of the experts, one after another on their own tensors: as stages, and each with any configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields

from torch import Tensor

from moe_triton.backends.stages import Stage
from moe_triton.backends.triton.experts import Problem, weight_gradient
from moe_triton.records import Dispatch, ExpertSpec
from moe_triton_kernels.combine import combine
from moe_triton_kernels.d_hidden import d_hidden, d_router_weights
from moe_triton_kernels.d_weight import d_bias
from moe_triton_kernels.down import down
from moe_triton_kernels.launch import Config
from moe_triton_kernels.tiles import tile_tables

# operation that has configurations -> the stages that run with its configuration
STAGES_OF = {
    "up": ("up",),
    "down": ("down",),
    "d_hidden": ("d_hidden",),
    "d_weight": ("d_weight_down", "d_weight_up"),
    "d_rows": ("d_rows",),
}
OP_OF = {stage: op for op, stages in STAGES_OF.items() for stage in stages}
KERNELS = {
    "tile_tables": "tile_tables_kernel",
    "up": "up_kernel",
    "down": "down_kernel",
    "combine": "combine_kernel",
    "d_hidden": "d_hidden_kernel",
    "d_router_weights": "d_router_weights_kernel",
    "d_weight_down": "d_weight_kernel",
    "d_weight_up": "d_weight_kernel",
    "d_rows": "down_kernel",
    "combine_backward": "combine_kernel",
    "d_bias_rows": "d_bias_kernel",
    "d_bias_gathered": "d_bias_kernel",
}
FORWARD = ("tile_tables", "up", "down", "combine")


def in_words(config: Config) -> str:
    """128x256x64 warps 8 stages 3, and what else is not 1, or switched on."""
    text = f"{config.block_m}x{config.block_n}x{config.block_k} warps {config.num_warps} stages {config.num_stages}"
    known = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
    for name, value in ((f.name, getattr(config, f.name)) for f in fields(config) if f.name not in known):
        if isinstance(value, bool):
            text += f" {name}" if value else ""
        elif value != 1:
            text += f" {name} {value}"
    return text


class Chosen(Problem):
    """A problem whose kernels run with given configurations where there are some: operation -> configuration."""

    chosen: Mapping[str, Config] = {}

    def config(self, op: str) -> Config:
        return self.chosen.get(op) or super().config(op)


class ExpertKernels:
    """The experts' kernels over one problem; every stage has the tensors that the stage before it made.

    Shapes as in `moe_triton.reference.moe_mlp`; grad_out [T, d]. All of them run once, with the configurations that
    `choose_config` gives; `chosen` (operation -> configuration) rules the calls that come later.
    """

    def __init__(
        self,
        hidden: Tensor,
        weights: Tensor,
        plan: Dispatch,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        spec: ExpertSpec,
        grad_out: Tensor,
    ) -> None:
        self.hidden, self.weights, self.plan, self.spec, self.grad_out = hidden, weights, plan, spec, grad_out
        self.parameters = (gate_up_proj, down_proj, gate_up_bias, down_bias)
        self.problem = Chosen(
            hidden, plan.offsets, plan.source, plan.position, gate_up_proj, down_proj, gate_up_bias, down_bias, spec
        )
        self.tiles = tile_tables(plan.offsets, self.problem.num_rows)
        self.a, self.h = self.up()
        self.rows = self.down()
        self.weighted_a, self.grad_h, self.shares = self.d_hidden()
        self.grad_rows = self.d_rows()

    def up(self) -> tuple[Tensor, Tensor]:
        plan = self.plan
        return self.problem.up(self.hidden, plan.source, self.tiles, keep_a=True, keep_h=True)

    def down(self) -> Tensor:
        problem = self.problem
        return down(
            self.a, self.tiles, problem.down, size_columns=problem.size_d,
            config=problem.config("down"), bias=problem.down_bias, router_weights=self.weights, source=self.plan.source,
        )  # fmt: skip

    def combine(self) -> Tensor:
        return combine(self.rows, self.plan.position, self.hidden.dtype)

    def d_hidden(self) -> tuple[Tensor, Tensor, Tensor]:
        problem, plan = self.problem, self.plan
        return d_hidden(
            self.grad_out, plan.source, self.tiles, problem.down.transposed(), self.h, self.weights,
            size_n=problem.size_n, activation=self.spec.activation, is_concatenated=self.spec.is_concatenated,
            config=problem.config("d_hidden"),
        )  # fmt: skip

    def d_router_weights(self) -> Tensor:
        plan = self.plan
        return d_router_weights(
            self.shares, self.grad_out, plan.source, self.tiles, self.problem.down_bias, self.weights
        )

    def d_weight_down(self) -> Tensor:
        return self.weight_gradient(self.grad_out, self.weighted_a, tokens_first=not self.spec.is_transposed)

    def d_weight_up(self) -> Tensor:
        return self.weight_gradient(self.hidden, self.grad_h, tokens_first=self.spec.is_transposed)

    def weight_gradient(self, tokens: Tensor, rows: Tensor, *, tokens_first: bool) -> Tensor:
        plan = self.plan
        return weight_gradient(self.problem, tokens, rows, plan.source, plan.offsets, tokens_first=tokens_first)

    def d_rows(self) -> Tensor:
        problem = self.problem
        return down(
            self.grad_h, self.tiles, problem.gate_up.transposed(), size_columns=problem.size_d,
            config=problem.config("d_rows"),
        )  # fmt: skip

    def combine_backward(self) -> Tensor:
        return combine(self.grad_rows, self.plan.position, self.hidden.dtype)

    def d_bias_rows(self) -> Tensor:
        return d_bias(self.grad_h, self.plan.source, self.plan.offsets, top_k=self.problem.top_k)

    def d_bias_gathered(self) -> Tensor:
        plan, top_k = self.plan, self.problem.top_k
        return d_bias(self.grad_out, plan.source, plan.offsets, top_k=top_k, router_weights=self.weights)

    def call(self, stage: str) -> Callable[[], object]:
        """What runs a stage of KERNELS once."""
        return {"tile_tables": lambda: tile_tables(self.plan.offsets, self.problem.num_rows)}.get(stage) or getattr(
            self, stage
        )


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
    """The kernels in the order in which `experts_forward` and `experts_backward` run them; arguments as above."""
    opened = ExpertKernels(hidden, weights, plan, gate_up_proj, down_proj, gate_up_bias, down_bias, spec, grad_out)
    absent = {"d_bias_rows": gate_up_bias is None, "d_bias_gathered": down_bias is None}
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
