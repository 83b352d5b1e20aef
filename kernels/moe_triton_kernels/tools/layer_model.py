"""A model on paper of one layer's time on a Hopper GPU: cycles per tile, programs, waves. It is no measurement.

    python -m moe_triton_kernels.tools.layer_model                    # the shapes of the SonicMoE paper and of models
    python -m moe_triton_kernels.tools.layer_model --device h100 --json
    python -m moe_triton_kernels.tools.layer_model --instructions down=111,d_weight_up=271   # with another binary's
    python -m moe_triton_kernels.tools.layer_model --binaries       # LOOPS beside what this Triton compiles

A step of a tile's main loop takes what is longer: the matrix units' cycles for its products, or the schedulers' for its
instructions (`LOOPS`, read from the binaries: `moe-triton inspect`). Before the loop the first loads arrive, behind it
the epilogue stores; a second resident program fills that time. Tiles come in waves over the processors. The clock falls
as the matrix units fill, to what a large product runs at. No kernel is faster than its floor (`floors`), and none is
known to be this fast: occupancy of caches, imbalance of experts and launch gaps are left out, except where `COST` says.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

from moe_triton_kernels.configs import bucket_of
from moe_triton_kernels.heuristics import heuristic
from moe_triton_kernels.launch import Config
from moe_triton_kernels.tools.cases import collect_cases
from moe_triton_kernels.tools.floors import DEVICES, FLOORS, Device, Shape
from moe_triton_kernels.tools.gpus import GPUS
from moe_triton_kernels.tools.models import MODELS, SONIC
from moe_triton_kernels.tools.occupancy import resident_programs
from moe_triton_kernels.tools.offline import Report, compile_parallel

ARCHITECTURE = "sm_90"
ITEMSIZE = 2
MODEL_TOKENS = 8192


class Cost(NamedTuple):
    """Assumptions, each an estimate from data sheets and published micro-benchmarks.

    num_sms          processors
    macs             multiply-adds of 16 bits that one processor's matrix units do in a cycle
    schedulers       instructions that one processor issues in a cycle
    clock, busy      Hz with idle matrix units, and with full ones, where power limits it
    step             cycles of every step for its barriers and waits
    prologue         cycles until the first loads are there
    copies           share of the bandwidth that kernels reach which only move rows
    rest             seconds of the launches between kernels, of routing and of the dispatch, in a pass
    """

    num_sms: int = 132
    macs: int = 2048
    schedulers: int = 4
    clock: float = 1.98e9
    busy: float = 1.46e9
    step: int = 40
    prologue: int = 1500
    copies: float = 0.85
    rest: float = 25e-6


COST = Cost()


class Loop(NamedTuple):
    """One operation's tile.

    op            its name in the tables of configurations
    columns       of its product, in block_n
    outputs       elements that it stores, in block_m * block_n
    epilogue      cycles for each of them, an estimate
    instructions  of a step of its main loop, in its binary
    """

    op: str
    columns: int
    outputs: int
    epilogue: float
    instructions: int


# Instructions per step of the main loop: Triton 3.7.1, sm_90, bf16, the configuration of long rows
LOOPS = {
    "up": Loop("up_gated", columns=2, outputs=3, epilogue=0.073, instructions=111),
    "down": Loop("down", columns=1, outputs=1, epilogue=0.046, instructions=90),
    "d_hidden": Loop("d_hidden_gated", columns=1, outputs=5, epilogue=0.11, instructions=104),
    "d_rows": Loop("d_rows", columns=1, outputs=1, epilogue=0.046, instructions=89),
    "d_weight_down": Loop("d_weight", columns=1, outputs=1, epilogue=0.076, instructions=139),
    "d_weight_up": Loop("d_weight", columns=1, outputs=1, epilogue=0.076, instructions=178),
}
# the binary of each, by its name among the offline cases
CASES = {
    "up": "up_gated_bf16_128x128x64_swiglu",
    "down": "down_bf16_128x256x64_k",
    "d_hidden": "d_hidden_gated_bf16_128x128x64_swiglu",
    "d_rows": "d_rows_bf16_128x256x64_columns",
    "d_weight_down": "d_weight_bf16_128x256x64_gather_left",
    "d_weight_up": "d_weight_bf16_128x256x64_gather_right",
}
NEAR = 15  # instructions between the binaries of the supported versions of Triton
FORWARD = ("gate", "up", "down", "combine")
BACKWARD = ("d_hidden", "d_weight_down", "d_weight_up", "d_rows", "combine", "gate (backward)")


@dataclass(frozen=True)
class Predicted:
    """Seconds of one kernel, its floor, and how it runs."""

    kernel: str
    seconds: float
    floor: float
    tiles: int = 0
    programs_per_sm: int = 0
    bound: str = "bytes"


def product(loop: Loop, kernel: str, shape: Shape, device: Device, cost: Cost = COST) -> Predicted:
    """Predict a grouped product, its rows spread evenly over the experts."""
    d, n = shape.hidden, shape.intermediate
    rows = shape.rows / shape.experts
    config = heuristic(loop.op, d, n, ITEMSIZE, ARCHITECTURE, bucket_of(rows))
    if loop.op == "d_weight":
        sizes = (2 * n, d) if kernel == "d_weight_up" else (d, n)
        per_expert = math.ceil(sizes[0] / config.block_m) * math.ceil(sizes[1] / config.block_n)
        contraction: float = rows
    else:
        width, contraction = {"up": (n, d), "down": (d, n), "d_hidden": (n, d), "d_rows": (d, 2 * n)}[kernel]
        per_expert = math.ceil(rows / config.block_m) * math.ceil(width / config.block_n)
    tiles, programs = shape.experts * per_expert, config.programs_per_sm
    cycles, busy = wave(config, loop, math.ceil(contraction / config.block_k), cost)
    waves = math.ceil(tiles / (cost.num_sms * programs))
    share = min(1.0, busy * programs / cycles)
    seconds = waves * cycles / (cost.clock - (cost.clock - cost.busy) * share)
    floor = FLOORS[kernel](shape).floor_s(device, shape.dtype)
    return Predicted(kernel, max(seconds, floor), floor, tiles, programs, "bytes" if floor > seconds else "cycles")


def wave(config: Config, loop: Loop, steps: int, cost: Cost) -> tuple[float, float]:
    """Return the cycles in which a processor does one tile in each of its programs, and those of a tile's products."""
    multiply = config.block_m * config.block_n * loop.columns * config.block_k / cost.macs
    issue = loop.instructions * config.num_warps / cost.schedulers
    main = steps * (max(multiply, issue) + cost.step)
    outputs = config.block_m * config.block_n * loop.outputs
    alone = main + cost.prologue + loop.epilogue * outputs
    return max(config.programs_per_sm * main, alone), steps * multiply


def moved(kernel: str, shape: Shape, device: Device, cost: Cost = COST) -> Predicted:
    """Predict a kernel that moves rows, or the gate, whose products hide behind reading X."""
    names = ("gate_split", "gate_d_hidden", "gate_d_weight") if kernel == "gate (backward)" else (kernel,)
    works = [FLOORS["gate_forward" if name == "gate" else name](shape) for name in names]
    floor = sum(work.floor_s(device, shape.dtype) for work in works)
    return Predicted(kernel, floor / cost.copies, floor)


def predict(
    shape: Shape, device: Device, cost: Cost = COST, loops: Mapping[str, Loop] = LOOPS
) -> dict[str, list[Predicted]]:
    """Predict every kernel of both passes."""

    def one(kernel: str) -> Predicted:
        if kernel in loops:
            return product(loops[kernel], kernel, shape, device, cost)
        return moved(kernel, shape, device, cost)

    return {"forward": [one(kernel) for kernel in FORWARD], "backward": [one(kernel) for kernel in BACKWARD]}


def seconds_of(kernels: list[Predicted], cost: Cost = COST) -> float:
    return sum(kernel.seconds for kernel in kernels) + cost.rest


def shapes() -> dict[str, Shape]:
    """The layers that the goals of benchmarks/README.md are about."""
    found = {}
    for size, (tokens, layers) in SONIC.items():
        for d, n, num_experts, top_k in layers:
            found[f"{size} n={n}"] = Shape(tokens=tokens, hidden=d, intermediate=n, experts=num_experts, top_k=top_k)
    for name, (d, n, num_experts, top_k) in MODELS.items():
        found[name] = Shape(tokens=MODEL_TOKENS, hidden=d, intermediate=n, experts=num_experts, top_k=top_k)
    return found


def with_instructions(text: str) -> dict[str, Loop]:
    """Return LOOPS with the numbers of "kernel=instructions,..."; ValueError for anything else."""
    loops = dict(LOOPS)
    for part in filter(None, text.split(",")):
        kernel, _, number = part.partition("=")
        if kernel not in loops or not number.isdecimal():
            raise ValueError(f"instructions: got {part!r}, wanted kernel=number with one of {', '.join(loops)}")
        loops[kernel] = loops[kernel]._replace(instructions=int(number))
    return loops


def binaries(jobs: int = 1) -> list[tuple[str, str, int, Report, int]]:
    """Compile the kernels of LOOPS: each with its case, the instructions in LOOPS, the report, and programs per SM."""
    reports, said = compile_parallel(ARCHITECTURE, list(CASES.values()), jobs)
    warps = {case.name: case.num_warps for case in collect_cases(ARCHITECTURE, every=True)}
    found = []
    for kernel, case in CASES.items():
        if case not in reports:
            raise RuntimeError(f"{case} does not compile: {said[-500:]}")
        report = reports[case]
        resident = resident_programs(
            ARCHITECTURE, registers=report.registers, shared_bytes=report.shared_bytes, num_warps=warps[case]
        )
        found.append((kernel, case, LOOPS[kernel].instructions, report, resident))
    return found


def print_binaries() -> int:
    """Print the table of `binaries`; 1 where a loop is further from LOOPS than NEAR, and the model is out of date."""
    print(f"{'kernel':15}{'assumed':>8}{'loop':>6}{'regs':>6}{'per SM':>8}  case")
    stale = 0
    for kernel, case, assumed, report, resident in binaries():
        print(f"{kernel:15}{assumed:8}{report.loop:6}{report.registers:6}{resident:8}  {case}")
        stale |= abs(report.loop - assumed) > NEAR
    return stale


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="h200", choices=[name for name in GPUS if name in ("h100", "h200")])
    parser.add_argument("--json", action="store_true", help="every kernel of every shape as JSON")
    parser.add_argument("--instructions", type=with_instructions, default="", help="of main loops, instead of LOOPS")
    parser.add_argument("--binaries", action="store_true", help="compile the kernels and compare their main loops")
    options = parser.parse_args()
    if options.binaries:
        return print_binaries()
    device = DEVICES[options.device]
    loops = options.instructions
    found = {name: (shape, predict(shape, device, loops=loops)) for name, shape in shapes().items()}
    if options.json:
        plain = {
            name: {part: [asdict(kernel) for kernel in kernels] for part, kernels in passes.items()}
            for name, (_, passes) in found.items()
        }
        print(json.dumps({"device": options.device, "cost": COST._asdict(), "layers": plain}, indent=1))
        return 0
    print(f"{options.device}: predicted on paper, not measured; shares are of P = {device.flops_16:.3g} FLOP/s")
    heading = f"{'layer':17}{'forward us':>11}{'of P':>6}{'backward us':>12}{'of P':>6}"
    print(f"{heading}  furthest above their floors (us)")
    for name, (shape, passes) in found.items():
        work = sum(FLOORS[kernel](shape).flops for kernel in ("up", "down"))
        forward, backward = (seconds_of(passes[part]) for part in passes)
        above = sorted((k for part in passes.values() for k in part), key=lambda k: k.floor - k.seconds)[:2]
        words = ", ".join(f"{k.kernel} {1e6 * k.seconds:.0f} ({1e6 * k.floor:.0f})" for k in above)
        cells = (f"{1e6 * forward:11.0f}{work / forward / device.flops_16:6.2f}"
                 f"{1e6 * backward:12.0f}{2 * work / backward / device.flops_16:6.2f}")  # fmt: skip
        print(f"{name:17}{cells}  {words}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
