"""The kernels of the experts as stages, one after another, each with its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields

from torch import Tensor

from moe_triton.backends.stages import Stage
from moe_triton.backends.triton.experts import Problem, weight_gradient
from moe_triton.records import Dispatch, ExpertSpec
from moe_triton_kernels.combine import combine
from moe_triton_kernels.configs import Config
from moe_triton_kernels.d_hidden import d_hidden, d_router_weights
from moe_triton_kernels.down import rows_times_experts
from moe_triton_kernels.tiles import tile_tables
from moe_triton_kernels.weight_grad import bias_grad

# stage -> the operation whose configuration it runs with (a gated one has its own)
OPS = {
    "up": "up", "down": "down", "d_hidden": "d_hidden", "d_weight_down": "d_weight", "d_weight_up": "d_weight",
    "d_rows": "d_rows",
}  # fmt: skip


def in_words(config: Config) -> str:
    """128x256x64, 8 warps, 3 stages, and what else is not 1."""
    text = f"{config.block_m}x{config.block_n}x{config.block_k} warps {config.num_warps} stages {config.num_stages}"
    known = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
    rest = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in known}
    return text + "".join(f" {name} {value}" for name, value in rest.items() if value != 1)


class Chosen(Problem):
    """A problem whose kernels run with given configurations where there are some, by the operation's name."""

    chosen: Mapping[str, Config] = {}

    def config(self, op: str) -> Config:
        gated = "_gated" if self.spec.is_gated and op in ("up", "d_hidden") else ""
        return self.chosen.get(op + gated) or super().config(op)


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
    configs: Mapping[str, Config] | None = None,
) -> list[Stage]:
    """The kernels in the order in which `experts_forward` and `experts_backward` run them, on their own tensors.

    Shapes as in `moe_triton.reference.moe_mlp`; grad_out [T, d]. `configs`: operation -> configuration, instead of the
    table's and the heuristic's.
    """
    index = (plan.offsets, plan.source, plan.position)
    problem = Chosen(hidden, *index, gate_up_proj, down_proj, gate_up_bias, down_bias, spec)
    problem.chosen = configs or {}
    offsets, source, position = index
    num_rows = problem.num_rows
    tiles = tile_tables(offsets, num_rows)

    def up() -> tuple[Tensor, Tensor]:
        return problem.up(hidden, source, tiles, offsets, keep_a=True, keep_h=True)

    a, h = up()

    def down() -> Tensor:
        return rows_times_experts(
            a, tiles, offsets, problem.down, size_columns=problem.size_d, config=problem.config("down"),
            bias=problem.down_bias, router_weights=weights, source=source,
        )  # fmt: skip

    rows = down()

    def hidden_gradient() -> tuple[Tensor, Tensor, Tensor]:
        return d_hidden(
            grad_out, source, tiles, offsets, problem.down.transposed(), h, weights, size_n=problem.size_n,
            activation=spec.activation, is_concatenated=spec.is_concatenated, config=problem.config("d_hidden"),
        )  # fmt: skip

    weighted_a, grad_h, shares = hidden_gradient()

    def row_gradient() -> Tensor:
        return rows_times_experts(
            grad_h, tiles, offsets, problem.gate_up.transposed(), size_columns=problem.size_d,
            config=problem.config("d_rows"),
        )  # fmt: skip

    grad_rows = row_gradient()
    in_order = not spec.is_transposed
    stages: list[tuple[str, bool, str, Callable[[], object]]] = [
        ("tile_tables", False, "tile_tables_kernel", lambda: tile_tables(offsets, num_rows)),
        ("up", False, "up_kernel", up),
        ("down", False, "rows_kernel", down),
        ("combine", False, "combine_kernel", lambda: combine(rows, position, hidden.dtype)),
        ("d_hidden", True, "d_hidden_kernel", hidden_gradient),
        (
            "d_router_weights",
            True,
            "router_weight_kernel",
            lambda: d_router_weights(shares, grad_out, source, tiles, offsets, problem.down_bias, weights),
        ),
        (
            "d_weight_down",
            True,
            "weight_grad_kernel",
            lambda: weight_gradient(problem, grad_out, weighted_a, source, offsets, tokens_first=in_order),
        ),
        (
            "d_weight_up",
            True,
            "weight_grad_kernel",
            lambda: weight_gradient(problem, hidden, grad_h, source, offsets, tokens_first=not in_order),
        ),
        ("d_rows", True, "rows_kernel", row_gradient),
        ("combine", True, "combine_kernel", lambda: combine(grad_rows, position, hidden.dtype)),
    ]
    if gate_up_bias is not None:
        gradient = lambda: bias_grad(grad_h, source, offsets, top_k=problem.top_k)  # noqa: E731
        stages.append(("d_bias_rows", True, "bias_grad_kernel", gradient))
    if down_bias is not None:
        gathered = lambda: bias_grad(grad_out, source, offsets, top_k=problem.top_k, router_weights=weights)  # noqa: E731
        stages.append(("d_bias_gathered", True, "bias_grad_kernel", gathered))
    return [
        Stage(
            name=name,
            is_backward=is_backward,
            kernel=kernel,
            config=in_words(problem.config(OPS[name])) if name in OPS else "",
            floors=(name,),
            call=call,
        )
        for name, is_backward, kernel, call in stages
    ]
