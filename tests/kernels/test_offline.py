"""Offline compilation: the numbers that it reports are read from binaries whose content is known."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_triton_kernels.launch import shared_limit
from moe_triton_kernels.tools import offline
from moe_triton_kernels.tools.case import Case
from moe_triton_kernels.tools.offline import (
    Report,
    broken_gates,
    compile_apart,
    compile_case,
    compile_parallel,
    find_number,
    named_cases,
)
from moe_triton_kernels.tools.order import order_faults

PRODUCTS = ["up", "down", "d_hidden", "d_weight"]
OTHERS = ["routing", "permutation", "combine", "tiles"]
MAIN_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")  # the others differ in their shared memory

KERNELS = """
import json, sys
from dataclasses import asdict
import triton
import triton.language as tl
from moe_triton_kernels.tools.case import Case
from moe_triton_kernels.tools.offline import compile_case


@triton.jit
def product(a, b, c, k, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    m, n, i = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, k, BLOCK):
        left = tl.load(a + m[:, None] * k + start + i[None, :])
        right = tl.load(b + (start + i[:, None]) * N + n[None, :])
        total = tl.dot(left, right, total)
    tl.store(c + m[:, None] * N + n[None, :], total)


@triton.jit
def copy(a, c, M: tl.constexpr):
    i = tl.arange(0, M)
    tl.store(c + i, tl.load(a + i))


@triton.jit
def descriptor_copy(a, c, M: tl.constexpr):
    source = tl.make_tensor_descriptor(a, [M, 64], [64, 1], [M, 64])
    target = tl.make_tensor_descriptor(c, [M, 64], [64, 1], [M, 64])
    target.store([0, 0], source.load([0, 0]))


for arch in sys.argv[1:]:
    signature = {"a": "*fp16", "b": "*fp16", "c": "*fp32", "k": "i32"}
    more = (128, 256, 16) if arch.startswith("gfx") else (64, 128, 32)  # than one warp has registers for
    for name, (rows, columns, step), warps in (("product", (128, 128, 64), 4), ("spilling", more, 1)):
        blocks = {"M": rows, "N": columns, "BLOCK": step}
        case = Case(
            name=name, fn=product, signature=signature, constexprs=blocks, num_warps=warps, aligned=["a", "b", "c", "k"]
        )
        print(json.dumps(asdict(compile_case(case, arch))))
    for fn in (copy, descriptor_copy):
        signature = {"a": "*fp16", "c": "*fp16"}
        case = Case(name=fn.__name__, fn=fn, signature=signature, constexprs={"M": 64})
        print(json.dumps(asdict(compile_case(case, arch))))
"""


def run_compiled(program: str, folder: Path, *arguments: str) -> list[Any]:
    """The JSON lines that a program prints in a process where kernels are compiled, not interpreted."""
    script = folder / "program.py"
    script.write_text(program)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    """Of the four kernels above, for all main targets."""
    return [Report(**report) for report in run_compiled(KERNELS, tmp_path_factory.mktemp("known"), *MAIN_TARGETS)]


@pytest.mark.parametrize("arch", MAIN_TARGETS)
def test_report_of_known_kernels(arch: str, known: list[Report]) -> None:
    reports = {report.kernel: report for report in known if report.arch == arch}
    product, spilling, copy, descriptor = (reports[name] for name in ("product", "spilling", "copy", "descriptor_copy"))
    # one of 64 * 128 numbers per thread has to be in a register, or to be spilled
    assert 64 < product.registers <= 512
    assert product.shared_bytes >= 2 * 64 * (128 + 128)
    assert spilling.spills > 0
    assert (product.wgmma > 0) == (arch == "sm_90")
    assert (product.mma > 0) == (arch != "sm_90")
    assert (product.cp_async > 0) == arch.startswith("sm_")
    assert (product.loop > 4) == arch.startswith("sm_")
    assert copy.loop == 0
    assert list(product.order) == []

    assert (copy.spills, copy.wgmma, copy.mma, copy.cp_async, copy.tma) == (0, 0, 0, 0, 0)
    assert 0 < copy.registers < 32
    assert (descriptor.tma > 0) == (arch in ("sm_90", "sm_100"))


@pytest.mark.parametrize("arch", [arch for arch in MAIN_TARGETS if arch != "sm_90"])  # `.ci/run` compiles all of its
def test_the_sample_compiles_without_spills(arch: str) -> None:
    reports = compile_apart(arch, PRODUCTS + OTHERS)
    assert [report.kernel for report in reports] == [
        case.name for case in offline.collect_cases(arch, PRODUCTS + OTHERS)
    ]
    assert all(report.arch == arch and report.registers > 0 for report in reports)
    assert [(report.kernel, report.spills) for report in reports if report.spills] == []
    assert [report for report in reports if report.shared_bytes > shared_limit(arch)] == []
    names = {case.name for case in offline.collect_cases(arch, PRODUCTS)}
    products = [report for report in reports if report.kernel in names and "_bf16_" in report.kernel]
    assert len(products) == 8
    assert all(report.mma > 0 for report in products)


def test_adapters_compile_without_spills_and_in_order() -> None:
    names = [case.name for case in offline.collect_cases("sm_90", ["narrow", "lora"])]
    assert [name.split("_bf16")[0] for name in names] == [
        "narrow_gathered", "d_adapter_gathered", "up_gated", "d_hidden_gated",
    ]  # fmt: skip
    plain, errors = compile_parallel("sm_90", [*names, *(name.removesuffix("_rank16") for name in names[2:])])
    assert errors == ""
    reports = [plain[name] for name in names]
    assert [(report.kernel, report.spills) for report in reports if report.spills] == []
    assert [(report.kernel, report.order) for report in reports if report.order] == []
    assert [report.kernel for report in reports if report.wgmma == 0] == [names[1]]  # 16 rows: mma.sync
    assert reports[1].mma > 0
    for report in reports[2:]:
        without = plain[report.kernel.removesuffix("_rank16")]
        assert report.wgmma == without.wgmma + 1  # one more step of 16
        assert report.tma == without.tma


def test_products_of_codes_compile_to_those_of_the_matrix_unit() -> None:
    reports = {report.kernel: report for report in compile_apart("sm_100", ["fp8"])}
    cases = {case.name: case for case in offline.collect_cases("sm_100", ["fp8"])}
    assert [(name, gates) for name, case in cases.items() if (gates := broken_gates(case, reports[name]))] == []
    products = [report for name, report in reports.items() if "_fp8e4nv_" in name]
    assert len(products) >= 8
    for report in products:
        assert report.fp8 > 0, report
        of_adapters = report.mma - report.fp8  # these are in 16 bits
        assert of_adapters > 0 if "_rank" in report.kernel else of_adapters == 0, report
        assert report.wgmma == 0, report


def test_what_the_gates_ask_of_products_of_codes() -> None:
    """`.ci/run` compiles all of Hopper's, and fails where a gate does."""
    products = [case for case in offline.collect_cases("sm_90", ["fp8"]) if "_fp8e4nv_" in case.name]
    assert len(products) >= 8
    assert [case.name for case in products if not {"fp8", "wgmma"} <= set(case.wants)] == []


DOWN = """
import json, sys
from dataclasses import asdict
from moe_triton_kernels.tools.cases import collect_cases
from moe_triton_kernels.tools.offline import compile_case

for arch in sys.argv[1:]:
    for case in collect_cases(arch, ["down"]):
        print(json.dumps(asdict(compile_case(case, arch, count_loop=False))))
"""


def test_the_other_targets_compile_within_their_shared_memory(tmp_path: Path) -> None:
    targets = sorted(set(offline.TARGETS) - set(MAIN_TARGETS))
    found = [Report(**report) for report in run_compiled(DOWN, tmp_path, *targets)]
    for arch in targets:
        reports = [report for report in found if report.arch == arch]
        assert [report.kernel for report in reports] == [case.name for case in offline.collect_cases(arch, ["down"])]
        assert all(report.spills == 0 and report.wgmma == 0 and report.mma > 0 for report in reports)
        assert all(0 < report.shared_bytes <= shared_limit(arch) for report in reports)


PTX = """
import json, sys
from moe_triton_kernels.tools.cases import collect_cases
from moe_triton_kernels.tools.offline import compile_source

for module in sys.argv[1:]:
    print(json.dumps(compile_source(collect_cases("sm_90", [module])[0], "sm_90").asm["ptx"]))
"""


def without(ptx: str, instruction: str) -> str:
    return "\n".join(line for line in ptx.splitlines() if not re.search(instruction, line))


def test_the_order_gates_fail_on_doctored_kernels(tmp_path: Path) -> None:
    """Of `up`, and of `d_weight` (copies by pointers), and of `down` (all by TMA: there is no fence to miss)."""
    for module, ptx in zip(
        ("up", "d_weight", "down"), run_compiled(PTX, tmp_path, "up", "d_weight", "down"), strict=True
    ):
        assert "wgmma.mma_async" in ptx
        assert order_faults(ptx) == []
        unfenced = order_faults(without(ptx, r"fence\.proxy\.async"))
        assert all("no proxy fence before the product" in fault for fault in unfenced)
        assert bool(unfenced) == (module != "down")
        unguarded = order_faults(without(ptx, r"\bbar\.sync"))
        assert unguarded
        assert all("no barrier between products and the next write" in fault for fault in unguarded)


def test_an_interpreted_function_and_an_unknown_architecture_are_refused() -> None:
    case = Case(name="plain", fn=lambda: None, signature={})
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_case(case, "sm_90")
    with pytest.raises(ValueError, match=r"arch must be one of sm_80, .*, got 'sm_00'"):
        compile_case(case, "sm_00")


def test_a_failed_compilation_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(offline, "collect_cases", lambda *_: [Case(name="broken", fn=None, signature={})])
    assert offline.main(["--arch", "sm_90", "--json"]) == 1
    captured = capsys.readouterr()
    assert "broken: RuntimeError" in captured.err
    assert captured.out == ""
    with pytest.raises(RuntimeError, match=r"offline compilation for sm_90 failed[\s\S]*no_such_module"):
        compile_apart("sm_90", modules=["no_such_module"])


def test_samples_are_a_part_of_all_cases() -> None:
    sample, every = (offline.collect_cases("sm_90", every=flag) for flag in (False, True))
    assert {case.name for case in sample} <= {case.name for case in every}
    names = [case.name for case in every]
    assert len(names) == len(set(names))


def test_two_parts_of_the_files_are_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[list[str]] = []
    monkeypatch.setattr(offline, "collect_cases", lambda arch, modules, every: parts.append(list(modules)) or [])
    for arguments in ("--modules=lora,narrow", "--without=lora,narrow", "--all"):
        assert offline.main(["--arch=sm_90", arguments]) == 0
    assert sorted(parts[0] + parts[1]) == sorted(parts[2])
    with pytest.raises(SystemExit):
        offline.main(["--arch=sm_90", "--without=nothing"])


def test_named_cases_in_several_processes() -> None:
    """In the order of the names, whoever compiled them; what cannot be compiled is missing, and said so."""
    names = ["tile_tables_E128", "permutation_count_E8", "tile_tables_E8"]
    seen: list[str] = []
    reports, errors = compile_parallel("sm_80", names, jobs=2, on_report=lambda report: seen.append(report.kernel))
    assert list(reports) == names
    assert sorted(seen) == sorted(names)
    assert all(report.arch == "sm_80" and report.registers > 0 for report in reports.values())
    assert errors == ""
    reports, errors = compile_parallel("sm_80", ["no_such_case"])
    assert reports == {}
    assert "only: got no_such_case, wanted names of cases" in errors


def test_cases_by_name() -> None:
    cases = [Case(name=name, fn=None, signature={}) for name in "abc"]
    assert named_cases(cases, None) == cases
    assert named_cases(cases, "c,a") == [cases[2], cases[0]]
    with pytest.raises(ValueError, match="only: got d, e, wanted names of cases"):
        named_cases(cases, "a,d,e")


def test_what_breaks_a_gate() -> None:
    case = Case(name="a", fn=None, signature={}, wants=["wgmma", "tma"])
    sizes = {"registers": 8, "shared_bytes": 200_000, "mma": 0, "cp_async": 0, "kernel": "a"}
    fine = Report(**sizes, arch="sm_90", spills=0, wgmma=4, tma=1)
    assert broken_gates(case, fine) == []
    bad = Report(**sizes, arch="sm_89", spills=8, wgmma=4, tma=0, order=["no barrier (PTX line 3)"])
    assert broken_gates(case, bad) == ["tma 0", "spills 8", "shared_bytes 200000 > 101376", "no barrier (PTX line 3)"]
    codes = replace(case, wants=["wgmma", "fp8"])
    assert broken_gates(codes, replace(fine, fp8=4)) == []
    assert broken_gates(codes, replace(fine, fp8=3)) == ["fp8 3 of 4"]
    assert broken_gates(codes, replace(fine, fp8=4, mma=1)) == ["fp8 4 of 5"]
    beside = replace(codes, signature={"adapter": "*bf16"})  # whose products are in 16 bits
    assert broken_gates(beside, replace(fine, fp8=4, mma=1)) == []
    assert broken_gates(beside, replace(fine, fp8=4)) == ["fp8 4 of 4"]


def test_missing_output_is_an_error() -> None:
    assert find_number(r"REG:(\d+)", "REG:12 STACK:0") == 12
    with pytest.raises(RuntimeError, match="no match"):
        find_number(r"REG:(\d+)", "nothing")
