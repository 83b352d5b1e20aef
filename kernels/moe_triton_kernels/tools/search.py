"""Other configurations of a grouped kernel: a configuration's neighbours, and what each compiles to with no GPU.

`python -m moe_triton_kernels.tools.search --arch sm_90` reads candidates from stdin, a JSON list of {"op", "dtype",
"format", "config"} objects, and prints one JSON object for each, as soon as it is compiled: its offline report and
broken gates, or the error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import torch

from moe_triton_kernels.gluon.schedules import OPS as GLUON_OPS
from moe_triton_kernels.gluon.schedules import SCHEDULES, available, cluster_error
from moe_triton_kernels.gluon.schedules import TYPES as GLUON_TYPES
from moe_triton_kernels.heuristics import fit, two_programs
from moe_triton_kernels.launch import HOPPER, MAX_REGISTERS, Config
from moe_triton_kernels.tiles import BLOCK_SIZES
from moe_triton_kernels.tools.case import Case
from moe_triton_kernels.tools.cases import PRODUCTS, collect_cases
from moe_triton_kernels.tools.offline import TARGETS, broken_gates, compile_case
from moe_triton_kernels.tools.quantized_cases import by_codes
from moe_triton_kernels.tools.shipped import TYPES, Shipped

MODULES = {
    "up_gated": "up", "up": "up", "down": "down", "d_rows": "down", "d_hidden_gated": "d_hidden",
    "d_hidden": "d_hidden", "d_weight": "d_weight",
}  # fmt: skip
LADDERS = {
    "block_m": BLOCK_SIZES,
    "block_n": (16, 32, 64, 128, 256),
    "block_k": (16, 32, 64, 128),
    "num_warps": (2, 4, 8, 16),
    "num_stages": (1, 2, 3, 4, 5, 6),
    "group": (1, 2, 4, 8, 16),
    "parts": (1, 2, 4),
    "programs_per_sm": (1, 2, 3, 4),
    "maxnreg": (128, 168, MAX_REGISTERS),
}
SWITCH = (False, True)


def is_sound(config: Config, op: str, d: int, n: int) -> bool:
    """Whether a configuration can be compiled for this size and is no waste from the start."""
    width = config.block_n * (2 if op == "up_gated" else 1)
    rows, columns, inner = {
        "down": (BLOCK_SIZES[-1], d, n),
        "d_rows": (BLOCK_SIZES[-1], d, n),
        "d_weight": (min(d, n), max(d, n), BLOCK_SIZES[-1]),
    }.get(op, (BLOCK_SIZES[-1], n, d))
    return (
        config.block_m <= fit(config.block_m, rows)
        and config.block_n <= fit(config.block_n, columns)
        and config.block_k <= fit(config.block_k, inner)
        and config.block_n // config.parts >= 16
        # half of a thread's registers for fp32 accumulators: more would spill
        and config.block_m * width <= 32 * config.num_warps * ((config.maxnreg + 1) // 2)
        and config.block_m * width >= 32 * config.num_warps  # an accumulator for every thread
    )


def seeds(op: str, d: int, n: int, architecture: str) -> list[Config]:
    """Configurations that differ from the heuristic's in more than one field, and are no step away from it."""
    if architecture not in HOPPER:
        return []
    return [config for config in two_programs(op) if is_sound(config, op, d, n)]


def neighbours(config: Config, op: str, d: int, n: int) -> Iterator[Config]:
    """The sound configurations that are one step away in one field; of a schedule, in a field that it reads."""
    if config.gluon is not None:  # a schedule has blocks of its own
        names = ["group"]
    else:
        names = [field.name for field in fields(config) if field.name != "gluon"]
    for name, ladder in ((name, LADDERS.get(name, SWITCH)) for name in names):
        value = getattr(config, name)
        below = [step for step in ladder if step < value][-1:]
        above = [step for step in ladder if step > value][:1]
        for step in (*above, *below):
            change: dict[str, Any] = {name: step}
            candidate = replace(config, **change)
            if is_sound(candidate, op, d, n):
                yield candidate


def has_schedules(op: str, dtype: torch.dtype, architecture: str) -> bool:
    """Whether an operation has warp-specialized kernels beside its plain one."""
    return op in GLUON_OPS and dtype in GLUON_TYPES and architecture in HOPPER


def warp_specialized(config: Config, op: str, dtype: torch.dtype, architecture: str) -> list[Config]:
    """The configuration with each schedule that an operation and this Triton have."""
    return [replace(config, gluon=name) for name in available()] if has_schedules(op, dtype, architecture) else []


def left_out(op: str, dtype: torch.dtype, architecture: str) -> str:
    """Which schedules of an operation this Triton does not have, and why; "" where it has all."""
    names = [name for name in SCHEDULES if name not in available()]
    return f"without {', '.join(names)}: {cluster_error()}" if names and has_schedules(op, dtype, architecture) else ""


def candidate_case(op: str, dtype: torch.dtype, config: Config, arch: str, format: str | None = None) -> Case:
    """The offline case of a candidate, as it would be listed if the candidate were all that ships.

    fp16 compiles like bf16. format: of the codes that it decodes.
    """
    if config.gluon is not None:
        return gluon_candidate(op, dtype, config.gluon, arch)
    name, module = TYPES.get(dtype, "bf16"), MODULES[op]
    candidates = [Shipped(op=other, dtype=name, config=config) for other in MODULES if MODULES[other] == module]
    case = next(case for case in PRODUCTS[module](arch, candidates) if case.name.startswith(f"{op}_{name}_"))
    return case if format is None else by_codes(case, format, arch, by_k=module in ("up", "down") and op != "d_rows")


def gluon_candidate(op: str, dtype: torch.dtype, schedule: str, arch: str) -> Case:
    """The offline case of a schedule, in the operation's usual layout."""
    form = SCHEDULES[schedule]
    cases = (
        case
        for case in collect_cases(arch, ["gluon"], every=True)
        if (case.constants["PING_PONG"], case.num_ctas) == (form.ping_pong, form.ctas)
    )
    return next(case for case in cases if case.name.startswith(f"{op}_{GLUON_TYPES[dtype]}_"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m moe_triton_kernels.tools.search", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--arch", choices=list(TARGETS), required=True)
    arch = parser.parse_args(arguments).arch
    for candidate in json.load(sys.stdin):
        found: dict[str, Any] = {"report": None, "broken": [], "error": ""}
        try:
            dtype = getattr(torch, candidate["dtype"])
            case = candidate_case(candidate["op"], dtype, Config(**candidate["config"]), arch, candidate["format"])
            report = compile_case(case, arch)
            found |= {"report": asdict(report), "broken": broken_gates(case, report)}
        except Exception as error:  # a candidate that does not compile is a result, too
            found["error"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
