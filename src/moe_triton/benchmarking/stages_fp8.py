"""The kernels of the experts with products in fp8 as stages: each product, and what makes its codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from moe_triton.backends.triton.fp8_problem import Fp8Problem
from moe_triton.benchmarking.stage import Stage
from moe_triton.kernel_stages import FORWARD, KERNELS, OP_OF, in_words
from moe_triton.records import ExpertCall, Wanted
from moe_triton_kernels.fp8 import CodedRows, ColumnCodes, RowCodes
from moe_triton_kernels.quantize import quantize_weight
from moe_triton_kernels.tiles import TileTables
from moe_triton_kernels.tools.floors import FP8_FLOORS

# what makes codes: name, kernel, floor; each runs before the stage that is named with it
MAKERS = {
    "up": (
        ("quantize W1", "quantize_weight_kernel", "quantize_weight"),
        ("quantize X", "quantize_rows_kernel", "quantize_rows"),
    ),
    "down": (("quantize W2", "quantize_weight_kernel", "quantize_weight_down"),),
    "d_hidden": (("quantize dO", "quantize_columns_kernel, both ways", "quantize_both"),),
    "d_weight_up": (("quantize gathered X", "quantize_columns_kernel", "quantize_columns"),),
}


class Coded(Fp8Problem):
    """Codes of tokens are made once, so that a product is timed without it."""

    def __init__(self, call: ExpertCall) -> None:
        super().__init__(call)
        self.made: dict[tuple[str, int], tuple[Tensor, Any]] = {}

    def once(self, how: str, x: Tensor, make: Callable[[], Any]) -> Any:
        if (how, id(x)) not in self.made:
            self.made[how, id(x)] = x, make()
        return self.made[how, id(x)][1]

    def rows_operand(self, x: Tensor | CodedRows) -> RowCodes:
        if isinstance(x, CodedRows):
            return super().rows_operand(x)
        return self.once("rows", x, lambda: Fp8Problem.rows_operand(self, x))

    def both_operands(self, x: Tensor, tiles: TileTables, *, sums: bool) -> tuple[RowCodes, ColumnCodes]:
        return self.once("both", x, lambda: Fp8Problem.both_operands(self, x, tiles, sums=sums))

    def gathered_operand(self, x: Tensor) -> ColumnCodes:
        return self.once("gathered", x, lambda: Fp8Problem.gathered_operand(self, x))


def fp8_calls(call: ExpertCall, grad_out: Tensor) -> tuple[Coded, dict[str, Callable[[], object]]]:
    """What runs each stage of KERNELS and MAKERS once, on what the stage before it made; grad_out [T, d]."""
    problem = Coded(call)
    tiles, hidden = problem.tiles(), problem.hidden
    a, h = problem.up(tiles, keep_a=True, keep_h=True)
    rows = problem.down_rows(a, tiles)
    weighted_a, grad_h, shares = problem.d_hidden(grad_out, h, tiles)
    grad_rows = problem.d_rows(grad_h, tiles)
    plain = Fp8Problem(call)
    sizes = {"size_k": problem.size_d, "size_columns": problem.call.width}
    down_sizes = {"size_k": problem.size_n, "size_columns": problem.size_d}
    return problem, {
        "tile_tables": problem.tiles,
        "quantize W1": lambda: quantize_weight(problem.gate_up, **sizes),
        "quantize X": lambda: plain.rows_operand(hidden),
        "up": lambda: problem.up(tiles, keep_a=True, keep_h=True),
        "quantize W2": lambda: quantize_weight(problem.down, **down_sizes),
        "down": lambda: problem.down_rows(a, tiles),
        "combine": lambda: problem.combine(rows),
        "quantize dO": lambda: plain.both_operands(grad_out, tiles, sums=problem.down_bias is not None),
        "d_hidden": lambda: problem.d_hidden(grad_out, h, tiles),
        "d_router_weights": lambda: problem.d_router_weights(shares, grad_out, tiles),
        "d_weight_down": lambda: problem.d_down(grad_out, weighted_a),
        "quantize gathered X": lambda: plain.gathered_operand(hidden),
        "d_weight_up": lambda: problem.d_gate_up(grad_h),
        "d_rows": lambda: problem.d_rows(grad_h, tiles),
        "combine_backward": lambda: problem.combine(grad_rows),
        "d_bias_rows": lambda: problem.d_gate_up_bias(grad_h),
        "d_bias_gathered": lambda: problem.d_down_bias(grad_out, weighted_a),
    }


def expert_stages(call: ExpertCall, grad_out: Tensor) -> list[Stage]:
    """The kernels in the order in which forward and backward run them; grad_out [T, d]."""
    problem, calls = fp8_calls(call, grad_out)
    wanted, found = Wanted().of(call.parameters), []
    there = {"d_bias_rows": wanted.gate_up_bias, "d_bias_gathered": wanted.down_bias}
    for name, kernel in KERNELS.items():
        if not there.get(name, True):
            continue
        is_backward, bare = name not in FORWARD, name.removesuffix("_backward")
        for maker, of, floor in MAKERS.get(name, ()):
            found.append(Stage(name=maker, is_backward=is_backward, kernel=of, floors=(floor,), call=calls[maker]))
        found.append(
            Stage(
                name=bare,
                is_backward=is_backward,
                kernel=f"fp8_{kernel}" if name.startswith("d_weight") else kernel,
                config=in_words(problem.config(OP_OF[name])) if name in OP_OF else "",
                floors=(f"fp8_{bare}" if f"fp8_{bare}" in FP8_FLOORS else bare,),
                call=calls[name],
            )
        )
    return found
