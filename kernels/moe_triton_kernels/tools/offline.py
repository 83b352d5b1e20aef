"""Compile kernels for a GPU that is not there, and read what the binary says: registers, spills, matrix instructions.

What is compiled is listed in `cases`. `python -m moe_triton_kernels.tools.offline --arch sm_90 --json` prints one JSON
object per case; `compile_apart` and `compile_parallel` run that in processes of their own, because one in which
TRITON_INTERPRET is set has interpreted functions only.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from moe_triton_kernels.launch import register_limit, shared_limit
from moe_triton_kernels.tools.case import Case, leaves
from moe_triton_kernels.tools.cases import MODULES, collect_cases
from moe_triton_kernels.tools.order import order_faults

TARGETS = {
    **{f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (80, 86, 89, 90, 100, 103, 120)},
    **{name: GPUTarget("hip", name, 64) for name in ("gfx942", "gfx950")},
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one binary needs and contains. Instruction counts are static: they are read off the assembly.

    registers     per thread; on AMD vector registers, accumulation registers included
    spills        bytes of stack per thread (0 when nothing was spilled)
    shared_bytes  shared memory per program, in bytes
    wgmma, mma    Hopper's warpgroup products; every other matrix instruction (mma.sync, tcgen05, mfma)
    fp8           those of either kind that multiply codes of 8 bits (NVIDIA)
    cp_async, tma asynchronous copies to shared memory by pointers; by descriptors
    multicast     those by descriptors that write to every program of a cluster
    setmaxnreg    changes of a warpgroup's share of the registers: warp specialization
    proxy_fence   fences between the generic and the asynchronous proxy
    loop          instructions of the main loop: the shortest one with a product (NVIDIA; 0 where there is none, and
                  where it is not counted)
    order         what is wrong with the order of copies, fences, barriers and products (see `order`)
    """

    kernel: str
    arch: str
    registers: int
    spills: int
    shared_bytes: int
    wgmma: int = 0
    mma: int = 0
    fp8: int = 0
    cp_async: int = 0
    tma: int = 0
    multicast: int = 0
    setmaxnreg: int = 0
    proxy_fence: int = 0
    loop: int = 0
    order: Sequence[str] = ()


PATTERNS = {
    "ptx": {
        "wgmma": r"\bwgmma\.mma_async",
        "mma": r"\b(?:mma\.sync|tcgen05\.mma)",
        "fp8": r"\b(?:wgmma\.mma_async|mma\.sync)\S*\.e4m3|\btcgen05\.mma\S*(?:f8f6f4)",
        "cp_async": r"\bcp\.async\.c[ag]\.shared",
        "tma": r"\bcp\.async\.bulk\.tensor",
        "multicast": r"\bcp\.async\.bulk\.tensor\S*\.multicast::cluster",
        "setmaxnreg": r"\bsetmaxnreg",
        "proxy_fence": r"\bfence\.proxy\.async",
    },
    "amdgcn": {"mma": r"\bv_mfma", "cp_async": r"\b(?:global_load_lds|buffer_load\w* .*\blds\b)"},
}


PRODUCT = re.compile(r"\b(?:\w*GMMA|\w*MMA|FFMA)\b")


def find_number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no match for {pattern!r} in the compiler's output:\n{text[:2000]}")
    return int(found.group(1))


def nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack, per thread, as cuobjdump reads them from a binary that holds one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return find_number(r"\bREG:(\d+)", usage), find_number(r"\bSTACK:(\d+)", usage)


def main_loop(cubin: bytes) -> int:
    """Instructions of the shortest loop with a product in a binary that holds one kernel; 0 where there is none."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "--print-code", "--no-dataflow", file.name]
        assembly = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    instructions: list[str] = []
    places: dict[str, int] = {}
    lengths = []
    for label, instruction in re.findall(r"^(\.L\w+):|^\s*/\*[0-9a-f]+\*/\s+([^;]+);", assembly, re.MULTILINE):
        if label:
            places[label] = len(instructions)
            continue
        instructions.append(instruction)
        branch = re.search(r"\bBRA\b.*`\((\.L\w+)\)", instruction)
        first = places.get(branch.group(1)) if branch else None
        if first is not None and any(PRODUCT.search(inner) for inner in instructions[first:]):
            lengths.append(len(instructions) - first)
    return min(lengths, default=0)


def amd_resources(assembly: str) -> tuple[int, int]:
    """Vector registers, and bytes of private memory, per thread, from the metadata at the end of the assembly."""
    return find_number(r"\.vgpr_count:\s+(\d+)", assembly), find_number(
        r"\.private_segment_fixed_size:\s+(\d+)", assembly
    )


def compile_source(case: Case, arch: str) -> CompiledKernel:
    """Compile a case for one of TARGETS; no GPU is needed.

    Raises RuntimeError where TRITON_INTERPRET is set, and what Triton raises where the compilation fails.
    """
    if arch not in TARGETS:
        raise ValueError(f"arch must be one of {', '.join(TARGETS)}, got {arch!r}")
    fn, constexprs = case.fn, case.constexprs
    if not isinstance(fn, triton.JITFunction):
        raise RuntimeError("compile_source needs @triton.jit functions: unset TRITON_INTERPRET, or use compile_apart")
    types = {arg: "constexpr" if arg in constexprs else case.signature[arg] for arg in fn.arg_names}
    inner = [leaf for number, (arg, kind) in enumerate(types.items()) for leaf in leaves(arg, kind, (number,))]
    pointers = [name for name, _, kind in inner if str(kind).startswith("*")]
    aligned = pointers if case.aligned is None else case.aligned
    constants: dict[tuple[int, ...], Any] = {(fn.arg_names.index(arg),): value for arg, value in constexprs.items()}
    constants |= {path: kind for _, path, kind in inner if not isinstance(kind, str)}
    source = source_class(fn)(
        fn=fn,
        signature={arg: type_of(kind) for arg, kind in types.items()},
        constexprs=constants,
        attrs={path: [["tt.divisibility", 16]] for name, path, _ in inner if name in aligned},
    )
    # fused multiply-adds are what a launch gets up to Triton 3.9, which warns where nobody says so
    options: dict[str, Any] = {
        "num_warps": case.num_warps, "num_stages": case.num_stages, "num_ctas": case.num_ctas,
        **register_limit(arch, case.maxnreg), "enable_fp_fusion": True,
    }  # fmt: skip
    return triton.compile(source, target=TARGETS[arch], options=options)


def compile_case(case: Case, arch: str, count_loop: bool = True) -> Report:
    """Compile a case as `compile_source` does, and read its binary."""
    return read_report(case.name, arch, compile_source(case, arch), count_loop)


def type_of(kind: Any) -> Any:
    """The type of an argument as Triton wants it: constants, within a tuple or not, are "constexpr"."""
    if isinstance(kind, str):
        return kind
    if not isinstance(kind, tuple):
        return "constexpr"
    parts = [type_of(part) for part in kind]
    return type(kind)(*parts) if hasattr(kind, "_fields") else tuple(parts)


def source_class(fn: triton.JITFunction) -> type[ASTSource]:
    """The class that hands a function to the compiler; Gluon's is imported only for a function that needs it."""
    if not fn.is_gluon():
        return ASTSource
    return importlib.import_module("triton.experimental.gluon._runtime").GluonASTSource


def read_report(name: str, arch: str, compiled: CompiledKernel, count_loop: bool) -> Report:
    if "cubin" in compiled.asm:
        kind = "ptx"
        registers, spills = nvidia_resources(compiled.asm["cubin"])
        loop = main_loop(compiled.asm["cubin"]) if count_loop else 0  # a third of a second, however small the kernel
        order = order_faults(compiled.asm["ptx"])
    else:
        kind = "amdgcn"
        registers, spills = amd_resources(compiled.asm["amdgcn"])
        loop, order = 0, []
    assembly = compiled.asm[kind]
    counts: dict[str, Any] = {what: len(re.findall(pattern, assembly)) for what, pattern in PATTERNS[kind].items()}
    return Report(
        kernel=name,
        arch=arch,
        registers=registers,
        spills=spills,
        shared_bytes=compiled.metadata.shared,
        loop=loop,
        order=order,
        **counts,
    )


def named_cases(cases: list[Case], names: str | None) -> list[Case]:
    """The cases of these comma-separated names, in their order (None: all). ValueError on a name that is not there."""
    if names is None:
        return cases
    found = {case.name: case for case in cases}
    unknown = [name for name in names.split(",") if name not in found]
    if unknown:
        raise ValueError(f"only: got {', '.join(unknown)}, wanted names of cases")
    return [found[name] for name in names.split(",")]


def compile_apart(arch: str, modules: Sequence[str] | None = None, every: bool = False) -> list[Report]:
    """The reports of `collect_cases(arch, modules, every)`, compiled in a process without TRITON_INTERPRET.

    Without the lengths of main loops. Raises RuntimeError, with the compiler's words, if any case does not compile.
    """
    options = [] if modules is None else ["--modules", ",".join(modules)]
    command, environment = own_process(arch, ["--no-loop", *options, *(["--all"] if every else [])])
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"offline compilation for {arch} failed:\n{result.stdout}{result.stderr}")
    return [Report(**json.loads(line)) for line in result.stdout.splitlines()]


def own_process(arch: str, options: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Command and environment of `main` in a process without TRITON_INTERPRET."""
    command = [sys.executable, "-m", "moe_triton_kernels.tools.offline", "--arch", arch, "--json", *options]
    return command, {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def compile_parallel(
    arch: str, names: Sequence[str], jobs: int = 1, on_report: Callable[[Report], None] | None = None
) -> tuple[dict[str, Report], str]:
    """The reports of the named cases by name, compiled by `jobs` processes, and what the compiler said on stderr.

    A case that does not compile is missing from the reports. `on_report` gets every one as it comes, from the
    thread that waits for its process.
    """
    reports: dict[str, Report] = {}

    def run(share: Sequence[str]) -> str:
        command, environment = own_process(arch, ["--only", ",".join(share)])
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
        ):
            for line in process.stdout or ():
                report = Report(**json.loads(line))
                reports[report.kernel] = report
                if on_report is not None:
                    on_report(report)
            process.wait()
            errors.seek(0)
            return errors.read()

    # neighbours in the list take about as long as each other: dealt out in turn, the shares are about equal
    shares = [share for first in range(jobs) if (share := names[first::jobs])]
    with ThreadPoolExecutor(max(1, len(shares))) as pool:
        errors = "".join(pool.map(run, shares))
    return {name: reports[name] for name in names if name in reports}, errors


def broken_gates(case: Case, report: Report) -> list[str]:
    """What a shipped kernel must not do: spill, ask for more shared memory than there is, miss the matrix units,
    multiply anything but codes where it should, read or overwrite shared memory out of order."""
    broken = [f"{what} 0" for what in case.wants if getattr(report, what) == 0]
    products, has_adapter = report.wgmma + report.mma, case.signature.get("adapter") is not None
    if "fp8" in case.wants and (report.fp8 < products) != has_adapter:  # an adapter's products are in 16 bits
        broken.append(f"fp8 {report.fp8} of {products}")
    if report.spills > 0:
        broken.append(f"spills {report.spills}")
    if report.shared_bytes > shared_limit(report.arch):
        broken.append(f"shared_bytes {report.shared_bytes} > {shared_limit(report.arch)}")
    return [*broken, *report.order]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m moe_triton_kernels.tools.offline", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--arch", choices=list(TARGETS), help="all of them if left out")
    parser.add_argument("--modules", help="comma-separated names of kernel files; all of them if left out")
    parser.add_argument("--without", default="", help="comma-separated names of kernel files to leave out")
    parser.add_argument("--all", action="store_true", help="every shipped configuration, not only the sample")
    parser.add_argument("--only", help="comma-separated names of cases: these instead of the sample")
    parser.add_argument("--gate", action="store_true", help="fail where a kernel breaks `broken_gates`")
    parser.add_argument("--json", action="store_true", help="one JSON object per kernel instead of a line of text")
    parser.add_argument("--no-loop", action="store_true", help="do not count the instructions of main loops: sooner")
    options = parser.parse_args(arguments)
    modules = list(MODULES) if options.modules is None else options.modules.split(",")
    left_out = [name for name in options.without.split(",") if name]
    if unknown := [name for name in left_out if name not in MODULES]:
        parser.error(f"without: got {', '.join(unknown)}, wanted some of {', '.join(MODULES)}")
    modules = [name for name in modules if name not in left_out]
    failures = 0
    for arch in TARGETS if options.arch is None else [options.arch]:
        for case in named_cases(collect_cases(arch, modules, options.all or options.only is not None), options.only):
            try:
                report = compile_case(case, arch, count_loop=not options.no_loop)
            except Exception as error:  # every kind of compiler error is reported, then the next kernel is tried
                failures += 1
                print(f"{arch} {case.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                continue
            fields = asdict(report)
            line = json.dumps(fields) if options.json else "  ".join(f"{key} {value}" for key, value in fields.items())
            print(line, flush=True)
            if options.gate and (broken := broken_gates(case, report)):
                failures += 1
                print(f"{arch} {case.name}: {', '.join(broken)}", file=sys.stderr, flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
