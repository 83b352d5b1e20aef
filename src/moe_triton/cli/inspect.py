"""`moe-triton inspect`: what every kernel compiles to, with no GPU: registers, spills, instructions, floor time."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from moe_triton import runtime
from moe_triton.benchmarking.cases import PRESETS
from moe_triton.benchmarking.text_tables import plain_console, print_table
from moe_triton.cli.arguments import EXIT_FAULT, EXIT_NO_GPU, SHAPE, checked, fail, pick, pick_model
from moe_triton.cli.display import StepDisplay
from moe_triton_kernels.tools.case import Case, leaves
from moe_triton_kernels.tools.floors import DEVICES, FLOORS, FP8_FLOORS, ITEMSIZE, PACKED_BITS, Device, Shape
from moe_triton_kernels.tools.occupancy import resident_programs

if TYPE_CHECKING:
    from moe_triton_kernels.tools.offline import Report

# and a device of each
ARCHITECTURES = {
    "sm_80": "a100", "sm_86": "a40", "sm_89": "l40s", "sm_90": "h200", "sm_100": "b200", "sm_103": "b300",
    "sm_120": "rtx-pro-6000", "gfx942": "mi300x", "gfx950": "mi355x",
}  # fmt: skip
CODES = "fp8e4nv"  # in the names of kernels that multiply codes of 8 bits
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NUMBERS = (  # heading, entry of a row, its unit, digits
    *(("regs", "registers", 1, 0), ("spills", "spills", 1, 0), ("shared KiB", "shared_bytes", 1024, 1)),
    *(("loop", "loop", 1, 0), ("wgmma", "wgmma", 1, 0), ("mma", "mma", 1, 0)),
    *(("cp.async", "cp_async", 1, 0), ("TMA", "tma", 1, 0)),
    *(("per SM", "resident_blocks", 1, 0), ("GFLOP", "flops", 1e9, 0), ("MB", "bytes", 1e6, 0)),
    ("floor us", "floor_us", 1, 1),
)
ALL_FLOORS = FLOORS | FP8_FLOORS
LESS = ("GFLOP", "MB", "cp.async", "shared KiB", "mma", "wgmma", "TMA", "loop")  # what a narrow table does without
DEFAULT_MODEL = "qwen3-30b"


def inspect(
    arch: Annotated[str, typer.Option(help=f"{', '.join(ARCHITECTURES)}, or all.")] = "sm_90",
    kernel: Annotated[
        str | None, typer.Option(help="Only kernels whose name begins like this, such as up_gated.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help=f"Floors are for this GPU: {', '.join(DEVICES)}. Default: by architecture.")
    ] = None,
    shape: Annotated[str | None, typer.Option(help="Floors are for this layer: T,d,n,E,K.")] = None,
    model: Annotated[
        str | None, typer.Option(help=f"Or for a model's, such as mixtral-8x7b or olmoe. Default: {DEFAULT_MODEL}.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Only the experts' kernels for bf16, fp16 (the same configurations) or fp32.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes that compile. Default: one per core, 8 at most.")] = None,
    gate: Annotated[bool, typer.Option("--gate/--no-gate", help="Whether a broken gate is an error.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array, an object per configuration.")] = False,
) -> None:
    """Compile every kernel and shipped configuration for a GPU that is not there, and read its binary.

    Gates: no spills, shared memory within the limit, matrix instructions (in fp8 none but those that multiply codes,
    and adapters') and asynchronous copies in the main loops, and on Hopper the order of copies, fences, barriers and
    products.
    Exit code: 0; 1 when a gate is broken; 2 for bad arguments; 3 when Triton is not installed.
    """
    if not runtime.TRITON_INSTALLED:
        fail("inspect", "Triton is not installed: pip install triton (Linux)", EXIT_NO_GPU)
    with checked("inspect"):
        wanted = pick_shape(shape, model, dtype)
        names = pick(arch, "arch", {**{name: [name] for name in ARCHITECTURES}, "all": list(ARCHITECTURES)})
        devices = {name: pick_device(name, device) for name in names}
        cases = {name: pick_cases(name, kernel, dtype) for name in devices}
        if jobs is not None and jobs < 1:
            raise ValueError(f"jobs: got {jobs}, wanted at least 1")
        runtime.check_table()  # it says which configuration runs
    rows: list[dict[str, Any]] = []
    with StepDisplay() as on_step:
        for name in devices:
            reports = compile_all(name, cases[name], jobs or min(8, len(os.sched_getaffinity(0))), on_step)
            rows += [describe(case, reports.get(case.name), name, wanted, devices[name]) for case in cases[name]]
    if as_json:
        json.dump(rows, sys.stdout, indent=2)
        print()
    else:
        print_tables(rows, wanted, devices)
    broken = [f"{row['arch']} {row['kernel']}: {', '.join(row['gate'])}" for row in rows if row["gate"]]
    if broken and gate:
        fail("inspect", "broken gates:\n  " + "\n  ".join(broken), EXIT_FAULT)


def pick_device(arch: str, device: str | None) -> Device:
    return pick(ARCHITECTURES[arch] if device is None else device.lower(), "device", DEVICES)


def pick_shape(shape: str | None, model: str | None, dtype: str | None) -> Shape:
    """The layer that floors are computed for; dtype and activation follow each kernel's own."""

    dtype_name = "bf16" if dtype is None else pick(dtype, "dtype", DTYPES, dtype)
    if shape is not None and model is not None:
        raise ValueError(f"shape: got {shape!r} together with model {model!r}, wanted one or the other")
    if shape is None:
        return model_shape(model or DEFAULT_MODEL, dtype_name)
    numbers = [part.strip() for part in shape.split(",")]
    if len(numbers) != 5 or not all(re.fullmatch(r"\d+", number) for number in numbers):
        raise ValueError(f"shape: got {shape!r}, wanted five integers T,d,n,E,K")
    sizes: dict[str, Any] = dict(zip(SHAPE, map(int, numbers), strict=True))
    return Shape(**sizes, dtype=dtype_name)


def model_shape(model: str, dtype: str) -> Shape:
    """The benchmark shape whose name begins with `model`; the one with the most tokens where it has several."""

    # of a name that stands twice, the larger layer comes later
    known = {case.name: case for name in ("sonic-12", "models") for case in PRESETS[name].cases}
    return replace(pick_model(model, known).shape, dtype=dtype)


def pick_cases(arch: str, kernel: str | None, dtype: str | None) -> list[Case]:
    from moe_triton_kernels.tools.cases import collect_cases

    cases = collect_cases(arch, every=True)
    if dtype is not None:  # bf16 and fp16 share their configurations
        wanted = (None, *(name for name, size in ITEMSIZE.items() if size == ITEMSIZE[dtype]))
        cases = [case for case in cases if is_routing(case) or float_type(case) in wanted]
    found = [case for case in cases if kernel is None or case.name.startswith(kernel)]
    if not found:
        names = dict.fromkeys(floor_name(case.name) or case.name for case in cases)
        raise ValueError(f"kernel: got {kernel!r}, wanted the beginning of a name: {', '.join(names)}")
    return found


def floor_name(kernel: str) -> str | None:
    """The entry of ALL_FLOORS that a case's name begins with: the longest. None for a kernel without one."""

    if f"_{CODES}_" in kernel:
        name = floor_name(kernel.replace(CODES, "bf16"))
        return f"fp8_{name}" if f"fp8_{name}" in FP8_FLOORS else name
    if kernel.startswith("d_weight_"):  # in the default layout dW2 = dO^T (w A) gathers left, dW1 = dH^T X right
        return "d_weight_down" if kernel.endswith("_gather_left") else "d_weight_up"
    names = [name for name in ALL_FLOORS if kernel == name or kernel.startswith(f"{name}_")]
    return max(names, key=len, default=None)


def is_routing(case: Case) -> bool:
    """Whether the kernel knows router weights and indices only: these are fp32 and int32, whatever the model is."""
    name = floor_name(case.name) or ""
    return name == "d_router_weights" or name.startswith(
        ("topk", "permutation", "tile_tables", "tile_offsets", "row_pieces", "small_")
    )


def float_type(case: Case) -> str | None:
    """Triton's name of the first floating-point tensor among the arguments; beside codes, of the first 16-bit one."""

    types = [kind for name in case.fn.arg_names for _, _, kind in leaves(name, case.signature.get(name), ())]
    known = [found[1] for kind in types if (found := re.match(r"(?:\*|tensordesc<)(bf16|fp16|fp32)\b", str(kind)))]
    narrow = [kind for kind in known if kind != "fp32"]
    return next(iter(narrow if narrow and f"*{CODES}" in types else known), None)


def format_of(case: Case) -> str | None:
    """The format of the projections that a kernel reads as codes, which its name has among the last parts."""
    return next((part for part in case.name.split("_") if part in PACKED_BITS), None)


def compile_all(arch: str, cases: Sequence[Case], jobs: int, on_step: Any) -> dict[str, Report]:
    from moe_triton_kernels.tools.offline import compile_parallel

    lock, done = threading.Lock(), 0
    what = f"compiling {len(cases)} kernels for {arch}, {jobs} at a time"
    on_step(what, 0.0)

    def count(_: Report) -> None:
        nonlocal done
        with lock:
            done += 1
            on_step(what, done / len(cases))

    reports, errors = compile_parallel(arch, [case.name for case in cases], jobs, count)
    if len(reports) < len(cases):
        typer.echo(errors, err=True)
    return reports


def describe(case: Case, report: Report | None, arch: str, shape: Shape, device: Device) -> dict[str, Any]:
    """One configuration as plain values.

    `gate` lists what is broken, [] when nothing is; the binary's numbers are null where it does not compile. `chosen`:
    whether this shape runs with this configuration (null for a kernel that has only one). flops, bytes and floor_us are
    those of the whole launch at this shape, in the kernel's own dtype.
    """
    from moe_triton_kernels.tools.offline import broken_gates

    config = {name: value for name, value in case.constants.items() if isinstance(value, bool | int | str)}
    gated = shape.gated
    if (activation := case.constants.get("ACTIVATION")) is not None:
        config["ACTIVATION"], gated = str(activation), activation.is_gated
    own = replace(shape, dtype=float_type(case) or shape.dtype, gated=gated, format=format_of(case))
    name = floor_name(case.name)
    work = None if name is None else ALL_FLOORS[name](own)
    stored = CODES if f"_{CODES}_" in case.name else own.dtype
    counts = ("registers", "spills", "shared_bytes", "loop", "wgmma", "mma", "cp_async", "tma")
    resident = None
    if report is not None:
        # of a warp-specialized program the launch option counts one of three groups of warps
        warps = 3 * case.num_warps if report.setmaxnreg else case.num_warps
        resident = resident_programs(
            arch, registers=report.registers, shared_bytes=report.shared_bytes, num_warps=warps
        )
    return {
        "kernel": case.name,
        "arch": arch,
        "config": {**config, "num_warps": case.num_warps, "num_stages": case.num_stages},
        **{count: None if report is None else getattr(report, count) for count in counts},
        "resident_blocks": resident,
        "chosen": is_chosen(case, arch, own, stored),
        "device": device.name,
        "flops": None if work is None else work.flops,
        "bytes": None if work is None else work.bytes,
        "floor_us": None if work is None else work.floor_s(device, "fp8" if stored == CODES else stored) * 1e6,
        "gate": ["does not compile"] if report is None else broken_gates(case, report),
    }


def is_chosen(case: Case, arch: str, shape: Shape, dtype: str) -> bool | None:
    """Whether the shape runs with the case's configuration where the operands of products have this dtype."""
    from moe_triton_kernels.configs import OPS, choose_config
    from moe_triton_kernels.launch import pipeline_stages, tile_of

    ops = [op for op in OPS if case.name.startswith(f"{op}_{dtype}_")]
    if not ops:
        return None
    op = max(ops, key=len)
    config = choose_config(
        op,
        d=shape.hidden,
        n=shape.intermediate,
        dtype=torch.float8_e4m3fn if dtype == CODES else DTYPES[dtype],
        num_rows=shape.rows,
        num_experts=shape.experts,
        architecture=arch,
        format=shape.format,
    )
    wanted = (tile_of(arch, config), config.num_warps, pipeline_stages(arch, config), config.maxnreg)
    return (case.signature["TILE"], case.num_warps, case.num_stages, case.maxnreg) == wanted


def print_tables(rows: Sequence[dict[str, Any]], shape: Shape, devices: dict[str, Device]) -> None:
    console = plain_console()
    sizes = f"T={shape.tokens} d={shape.hidden} n={shape.intermediate} E={shape.experts} K={shape.top_k}"
    for arch, device in devices.items():
        title = f"{arch}: floors at {sizes} on {device.name} ({device.source}); * what it runs with"
        columns = ("kernel", *(heading for heading, *_ in NUMBERS), "gate")
        shown = [cells(row) for row in rows if row["arch"] == arch]
        print_table(console, columns, shown, ("kernel", "gate"), LESS, title=title)
    broken = sum(bool(row["gate"]) for row in rows)
    console.print(f"{len(rows)} configurations, {broken or 'no'} broken gate{'s' * (broken != 1)}", highlight=False)


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table; a number that is not known is left empty."""
    numbers = ("" if row[key] is None else f"{row[key] / unit:,.{digits}f}" for _, key, unit, digits in NUMBERS)
    return [row["kernel"] + " *" * bool(row["chosen"]), *numbers, ", ".join(row["gate"]) or "ok"]
