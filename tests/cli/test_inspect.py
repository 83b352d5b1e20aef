"""moe-triton inspect: what it lists, what it says of a kernel, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moe_triton import runtime
from moe_triton.benchmarking.cases import PRESETS
from moe_triton.cli import app
from moe_triton.cli.inspect import ARCHITECTURES, DTYPES, describe, floor_name, model_shape, pick_cases, pick_shape
from moe_triton_kernels import configs
from moe_triton_kernels.tools import offline
from moe_triton_kernels.tools.floors import DEVICES
from moe_triton_kernels.tools.offline import Report
from moe_triton_kernels.tools.shipped import TYPES, Shipped, shipped_configs

COUNTS = ("registers", "spills", "shared_bytes", "loop", "wgmma", "mma", "cp_async", "tma")


def fine(kernel: str, arch: str = "sm_90", **changes: Any) -> Report:
    counts = {"registers": 128, "spills": 0, "shared_bytes": 1024, "wgmma": 4, "mma": 4, "cp_async": 8, "tma": 4}
    counts |= {"setmaxnreg": 0, "proxy_fence": 1, "fp8": 4 if "_rank" in kernel else 8}  # adapters are in 16 bits
    if "cooperative" in kernel or "ping_pong" in kernel:
        counts["setmaxnreg"] = 8
    return Report(kernel=kernel, arch=arch, **{**counts, **changes})


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, Report | None]:
    """Nothing is compiled: every kernel gets a fine report, or what the test puts here: None for a failure."""
    special: dict[str, Report | None] = {}

    def reports(arch: str, names: list[str], jobs: int, on_report) -> tuple[dict[str, Report], str]:
        found = {name: special.get(name, fine(name, arch)) for name in names}
        return {name: report for name, report in found.items() if report is not None}, "the compiler's words"

    monkeypatch.setattr(offline, "compile_parallel", reports)
    return special


def run(*arguments: str):
    return CliRunner().invoke(app, ["inspect", *arguments])


def test_a_real_compilation_as_json() -> None:
    """In a process of its own, although these tests run the kernels in the interpreter."""
    command = [sys.executable, "-m", "moe_triton", "inspect", "--kernel", "tile_tables", "--jobs", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)
    assert [row["kernel"] for row in rows] == ["tile_tables_E8", "tile_tables_E128", "tile_tables_E1024"]
    assert "compiling 3 kernels for sm_90, 2 at a time" in done.stderr
    for row in rows:
        assert row["arch"] == "sm_90"
        assert row["device"] == "h200"
        assert row["gate"] == []
        assert row["registers"] > 0
        assert row["resident_blocks"] > 0
        assert row["config"]["num_warps"] == 4
        assert (row["spills"], row["wgmma"], row["mma"]) == (0, 0, 0)
        assert row["floor_us"] == pytest.approx(row["bytes"] / 4.3e12 * 1e6)


def test_every_kernel_has_a_row_with_every_key(compiled: dict[str, Report | None]) -> None:
    result = run("--json", "--arch", "all")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    for arch, device in ARCHITECTURES.items():
        mine = [row for row in rows if row["arch"] == arch]
        assert [row["kernel"] for row in mine] == [case.name for case in offline.collect_cases(arch, every=True)]
        assert {row["device"] for row in mine} == {device}
    for row in rows:
        assert {*COUNTS, "config", "resident_blocks", "chosen", "flops", "bytes", "floor_us", "gate"} < set(row)
        assert row["bytes"] > 0, row["kernel"]
        assert row["floor_us"] > 0


def test_a_gemm_in_numbers() -> None:
    shape = model_shape("mixtral", "bf16")
    assert (shape.tokens, shape.hidden, shape.intermediate, shape.experts, shape.top_k) == (16384, 4096, 14336, 8, 2)
    case = next(case for case in pick_cases("sm_90", "down_bf16_128", None))
    report = fine(case.name, registers=212, shared_bytes=147456)
    row = describe(case, report, "sm_90", shape, DEVICES["h200"])
    assert row["chosen"] is True
    assert row["resident_blocks"] == 1
    assert row["flops"] == 2 * 16384 * 2 * 14336 * 4096
    assert row["floor_us"] == pytest.approx(row["flops"] / 790e12 * 1e6)
    assert row["config"]["BLOCK_M"] == 128
    assert describe(case, report, "sm_90", replace(shape, tokens=8), DEVICES["h200"])["chosen"] is False


def test_the_floor_of_a_kernel_follows_its_name_and_its_dtype() -> None:
    expected = {
        "up_gated_bf16_128x128x64_swiglu": "up",
        "d_hidden_bf16_x": "d_hidden",
        "d_weight_bf16_128x256x64_gather_left": "d_weight_down",
        "d_weight_bf16_128x256x64_gather_right": "d_weight_up",
        "topk_sums": "topk_sums",
        "topk_backward_qwen3": "topk_backward",
        "topk_qwen3": "topk",
        "permutation_keep_by_key": "permutation_keep",
        "d_router_weights": "d_router_weights",
        "up_gated_fp8e4nv_64x128x128_even": "fp8_up",
        "d_weight_fp8e4nv_128x128x128_even": "fp8_d_weight_up",
        "mxfp8_rows_fp8e4nv_128x128x128_e8m0": "mxfp8_rows",
        "upside_down": None,
    }
    assert {name: floor_name(name) for name in expected} == expected
    shape, h200 = pick_shape("64,32,16,4,2", None, None), DEVICES["h200"]
    by_name = {case.name: case for case in pick_cases("sm_90", None, None)}

    def row(start: str) -> dict:
        case = next(case for name, case in by_name.items() if name.startswith(start))
        return describe(case, fine(case.name), "sm_90", shape, h200)

    assert row("up_gated_fp32")["bytes"] == 2 * row("up_gated_bf16")["bytes"]
    assert row("up_gated_bf16")["flops"] == 2 * row("up_bf16")["flops"]
    assert row("up_gated_fp8e4nv")["flops"] == row("up_gated_bf16")["flops"]
    assert row("up_gated_fp8e4nv")["bytes"] < 0.7 * row("up_gated_bf16")["bytes"]
    assert row("up_gated_fp8e4nv")["chosen"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_benchmark_shape_runs_with_a_configuration_that_is_listed(arch: str) -> None:
    listed = set(shipped_configs(arch))
    for name in ("sonic-12", "models", "scatter", "decode", "skew"):
        for case in PRESETS[name].cases:
            for op in configs.OPS:
                for dtype in (torch.bfloat16, torch.float32):
                    config = configs.choose_config(
                        op,
                        d=case.hidden,
                        n=case.intermediate,
                        dtype=dtype,
                        num_rows=case.tokens * case.top_k,
                        num_experts=case.experts,
                        architecture=arch,
                    )
                    entry = Shipped(op=op, dtype=TYPES[dtype], config=config)
                    assert entry in listed, (case.title(), op)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_op_of_a_shape_has_a_chosen_row(arch: str) -> None:
    for text in ("32768,2048,768,128,8", "4,2048,768,128,8", "40960,768,256,128,8"):
        shape = pick_shape(text, None, None)
        chosen = [
            case.name
            for case in pick_cases(arch, None, "bf16")
            if describe(case, None, arch, shape, DEVICES["h200"])["chosen"]
        ]
        assert {op for op in configs.OPS if any(name.startswith(f"{op}_bf16_") for name in chosen)} == set(configs.OPS)


def test_the_gates_ask_for_matrix_units_and_asynchronous_copies() -> None:
    """On Hopper: wgmma in bf16 products of 64 rows or more, mma.sync below; copies by cp.async, by TMA, or both."""
    gemms = [case for case in pick_cases("sm_90", None, None) if "FENCE" in case.constants]
    assert len(gemms) > 40
    for case in gemms:
        assert {"cp_async", "tma"} & {*case.wants}, case.name
        by_tma = sum(str(kind).startswith("tensordesc") for kind in case.signature.values())
        assert ("cp_async" in case.wants) == (by_tma < 2), case.name
        if "_bf16_" in case.name:
            assert ("wgmma" if case.constants["BLOCK_M"] >= 64 else "mma") in case.wants, case.name


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"spills": 8}, "spills 8"),
        ({"shared_bytes": 232449}, "shared_bytes 232449 > 232448"),
        ({"wgmma": 0}, "wgmma 0"),
        ({"tma": 0}, "tma 0"),
        (
            {"order": ["no barrier between products and the next write (PTX line 7)"]},
            "no barrier between products and the next write (PTX line 7)",
        ),
    ],
)
def test_a_broken_gate_ends_with_1(compiled: dict[str, Report | None], broken: dict[str, Any], words: str) -> None:
    name = "down_bf16_128x256x64_k"
    compiled[name] = fine(name, **broken)
    assert run("--kernel", "down", "--json", "--no-gate").exit_code == 0
    result = run("--kernel", "down", "--json", "--gate")
    assert result.exit_code == 1
    assert f"sm_90 {name}: {words}" in result.stderr
    gates = {row["kernel"]: row["gate"] for row in json.loads(result.stdout)}
    assert gates.pop(name) == [words]
    assert not any(gates.values())


def test_a_kernel_that_does_not_compile_ends_with_1(compiled: dict[str, Report | None]) -> None:
    compiled["tile_tables_E8"] = None
    result = run("--kernel", "tile_tables")
    assert result.exit_code == 1
    assert "the compiler's words" in result.stderr
    assert "sm_90 tile_tables_E8: does not compile" in result.stderr
    assert "3 configurations, 1 broken gate" in result.stdout


def test_the_table(compiled: dict[str, Report | None]) -> None:
    result = run("--arch", "gfx942", "--kernel", "down_bf16", "--model", "gpt-oss-20b")
    assert result.exit_code == 0
    assert "T=16384 d=2880 n=2880 E=32 K=4 on mi300x (data-sheet peak, AMD Instinct MI300X)" in result.stdout
    assert "no broken gates" in result.stdout
    starred = [line for line in result.stdout.splitlines() if " * " in line and "down_bf16_128" in line]
    assert starred


def test_dtype_filters_the_experts_kernels_only(compiled: dict[str, Report | None]) -> None:
    names = {name: {row["kernel"] for row in json.loads(run("--json", "--dtype", name).stdout)} for name in DTYPES}
    assert names["bf16"] == names["fp16"]
    assert not any("_fp32_" in name and not name.startswith("topk") for name in names["bf16"])
    assert not any("_bf16_" in name for name in names["fp32"])
    starts = ("topk", "permutation", "tile", "d_router", "row_", "small_dispatch", "small_route", "address_table")
    routing = {name for name in names["bf16"] if name.startswith(starts)}
    assert routing == names["bf16"] & names["fp32"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--arch", "sm_00"),
            "arch: got 'sm_00', wanted one of sm_80, sm_86, sm_89, sm_90, sm_100, sm_103, sm_120, gfx942, gfx950, all",
        ),
        (("--kernel", "sideways"), "kernel: got 'sideways', wanted the beginning of a name: up, down, "),
        (("--device", "tpu"), "device: got 'tpu', wanted one of a100, h100"),
        (("--shape", "1,2,3"), "shape: got '1,2,3', wanted five integers T,d,n,E,K"),
        (("--shape", "1,2,3,4,-5"), "wanted five integers"),
        (("--shape", "1,2,3,4,5"), "top_k: got 5, wanted at most 4"),
        (("--shape", "0,2,3,4,1"), "tokens: got 0, wanted at least 1"),
        (("--model", "gpt-9"), "model: got 'gpt-9', wanted one of 1.4b-n-256"),
        (("--model", "qwen3"), "wanted one of qwen3-30b-a3b, qwen3-235b-a22b"),
        (("--model", "olmoe", "--shape", "1,2,3,4,1"), "shape: got '1,2,3,4,1' together with model 'olmoe'"),
        (("--dtype", "fp8"), "dtype: got 'fp8', wanted one of bf16, fp16, fp32"),
        (("--jobs", "0"), "jobs: got 0, wanted at least 1"),
    ],
)
def test_bad_arguments_end_with_2(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "TRITON_INSTALLED", False)
    result = run()
    assert result.exit_code == 3
    assert "Triton is not installed" in result.stderr
