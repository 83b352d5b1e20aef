"""The kernels of the experts, one after another on their own tensors: as stages, and each with any configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from moe_triton.backends.triton.problem import Problem
from moe_triton.benchmarking.stage import Stage
from moe_triton.kernel_stages import FORWARD, KERNELS, OP_OF, OVER_CODES, full_name, in_words
from moe_triton.quantization import QuantizedWeight
from moe_triton.records import ExpertCall, Wanted
from moe_triton_kernels.gluon.schedules import why_unsupported
from moe_triton_kernels.heuristics import over_codes
from moe_triton_kernels.launch import Config, target_of
from moe_triton_kernels.operands import PerExpert
from moe_triton_kernels.tools.shipped import TYPES, shipped_configs


class Chosen(Problem):
    """A problem whose kernels run with given configurations where there are some: operation -> configuration.

    decoded: operation -> its projection in numbers, where the kernel does not decode the codes itself.
    """

    def __init__(self, call: ExpertCall) -> None:
        super().__init__(call)
        self.chosen = {}
        self.decoded: dict[str, PerExpert] = {}
        if isinstance(call.parameters.down, QuantizedWeight):
            self.decoded = {op: read for op in OVER_CODES if (read := self.decode(op)).decoding is None}

    @property
    def chosen(self) -> Mapping[str, Config]:
        return self._chosen

    @chosen.setter
    def chosen(self, configs: Mapping[str, Config]) -> None:
        self._chosen, self.kernels = configs, {}  # not those that calls share

    def config(self, op: str, weight: PerExpert | None = None) -> Config:
        return self.chosen.get(op) or super().config(op, weight)

    def projection(self, op: str) -> PerExpert:
        """The projection that an operation of OVER_CODES multiplies by, as the layer has it."""
        of = self.gate_up_operand if OVER_CODES[op] == "W1" else self.down_operand
        return of(back=op not in FORWARD)

    def decode(self, op: str) -> PerExpert:
        """The projection as the kernel reads it, decoded anew where it does not decode by itself."""
        return super().read(self.projection(op), op)

    def read(self, projection: PerExpert, op: str) -> PerExpert:
        return self.decoded[op] if op in self.decoded else super().read(projection, op)

    def reads_codes(self, op: str) -> bool:
        """Whether the kernel of an operation decodes codes in its loop."""
        return op in OVER_CODES and self.read(self.projection(op), op).decoding is not None

    def running(self, op: str) -> Config:
        """The configuration that an operation runs with."""
        return self.config(op, self.read(self.projection(op), op) if op in OVER_CODES else None)

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
            "d_bias_gathered": lambda: problem.d_down_bias(grad_out, self.weighted_a),
            **{f"decode_{op}": partial(problem.decode, op) for op in problem.decoded},
        }

    def call(self, stage: str) -> Callable[[], object]:
        """What runs a stage of KERNELS once."""
        return self.calls[stage]


def shipped_for(problem: Chosen, op: str) -> list[Config]:
    """Every configuration that ships for an operation on the problem's device, in its dtype (fp16 shares bf16's)."""
    architecture = target_of(problem.hidden.device).architecture
    name, dtype = full_name(op, problem.spec.is_gated), TYPES.get(problem.hidden.dtype, "bf16")
    found = [s.config for s in shipped_configs(architecture) if s.op == name and s.dtype == dtype]
    return [over_codes(name, config) for config in found] if problem.reads_codes(op) else found


def expert_stages(call: ExpertCall, grad_out: Tensor) -> list[Stage]:
    """The kernels in the order in which `experts_forward` and `experts_backward` run them; grad_out [T, d]."""
    opened = ExpertKernels(call, grad_out)
    problem, wanted = opened.problem, Wanted().of(call.parameters)
    there = {
        "d_weight_up": wanted.gate_up,
        "d_weight_down": wanted.down,
        "d_bias_rows": wanted.gate_up_bias,
        "d_bias_gathered": wanted.down_bias,
    }
    found = []
    for name, kernel in KERNELS.items():
        if not there.get(name, True):
            continue
        is_backward = name not in FORWARD
        if name in problem.decoded:
            floor = "decode" if OVER_CODES[name] == "W1" else "decode_down"
            first = opened.call(f"decode_{name}")
            of = f"decode for {name}"
            found.append(Stage(name=of, is_backward=is_backward, kernel="decode_kernel", floors=(floor,), call=first))
        found.append(
            Stage(
                name=name.removesuffix("_backward"),
                is_backward=is_backward,
                kernel=f"{kernel}, which decodes" if problem.reads_codes(name) else kernel,
                config=in_words(problem.running(OP_OF[name])) if name in OP_OF else "",
                floors=(name.removesuffix("_backward"),),
                decoded=name in problem.decoded,
                call=opened.call(name),
            )
        )
    return found
