"""Checks by means of other programs: compute-sanitizer, the assembler that comes with torch, ncu's counters."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_run.device import assembler, tool, torch_ptxas, torch_replaces_assembler, version_of

from gpu_checks import numerics
from gpu_checks.setting import Setting, Skipped

SCRIPT = Path(__file__).parent.parent / "gpu.py"
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats")


def worker(step: str, items: Sequence[str], seed: int) -> list[str]:
    """The command of some items of a step, for a tool to run; it belongs to the process group of its caller."""
    options = ["--worker", step, "--items", "|".join(items), "--seed", str(seed), "--seconds", "3600"]
    return [sys.executable, str(SCRIPT), *options]


def sanitizer(setting: Setting) -> str:
    """compute-sanitizer over the smallest problems, without torch's allocator, which would hide reads past the end."""
    setting.need_gpu()
    program = tool("compute-sanitizer")
    if program is None:
        raise Skipped("compute-sanitizer is not installed")
    command = [program, "--tool", "memcheck", "--error-exitcode", "9"]
    command += worker("sanitized", [f"sanitized: {name}" for name in numerics.SMALL], setting.seed)
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    text = done.stdout + done.stderr
    if "Device not supported" in text:
        raise Skipped("compute-sanitizer refuses this device")
    summary = next((line for line in text.splitlines() if "ERROR SUMMARY" in line), None)
    assert summary is not None, f"no summary, exit {done.returncode}: {text[-500:]}"
    assert "ERROR SUMMARY: 0 errors" in summary, text[:1500]
    assert text.count('"status": "ok"') == len(numerics.SMALL), f"the problems themselves: {text[-500:]}"
    return "memcheck: 0 errors"


def other_assembler(setting: Setting) -> str:
    """The same results by the assembler that comes with torch, which torch.compile makes Triton use."""
    setting.need_gpu()
    path = torch_ptxas()
    if path is None:
        raise Skipped("torch comes with no assembler")
    if not torch_replaces_assembler():
        raise Skipped("torch.compile leaves Triton's assembler for this GPU as it is")
    own = assembler()
    with mock.patch.dict(os.environ, {"TRITON_PTXAS_PATH": str(path)}):
        assert assembler() == version_of(str(path)), f"Triton still uses {assembler()}"
        for name in numerics.SMALL:
            numerics.small(name)(setting)
        numerics.experts_gated(torch.bfloat16, (0, 4))(setting)
    return f"torch's {version_of(str(path))}, beside Triton's {own}"


def counters(step: str, item: str, setting: Setting) -> dict[str, Any]:
    """ncu's counters of the kernels that an item runs between cudaProfilerStart and cudaProfilerStop."""
    setting.need_gpu()
    program = tool("ncu")
    if program is None:
        raise Skipped("ncu is not installed")
    command = [program, "--clock-control", "none", "--profile-from-start", "off", "--csv"]
    for section in SECTIONS:
        command += ["--section", section]
    done = subprocess.run(
        [*command, *worker(step, [item], setting.seed)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    kernels = read_counters(done.stdout)
    assert kernels, f"ncu counted nothing, exit {done.returncode}: {(done.stdout + done.stderr)[-1000:]}"
    return {"note": f"{len(kernels)} kernels", "kernels": kernels}


def read_counters(text: str) -> list[dict[str, Any]]:
    """ncu's table, a row for each figure, as one dict for each launch: "kernel", and name [unit] -> figure."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID","')), None)
    found: dict[str, dict[str, Any]] = {}
    for row in [] if begin is None else csv.DictReader(io.StringIO("\n".join(lines[begin:]))):
        if row.get("Metric Name") and row["ID"].isdigit():
            launch = found.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
            unit = f" [{row['Metric Unit']}]" if row["Metric Unit"] else ""
            launch[f"{row['Metric Name']}{unit}"] = row["Metric Value"]
    return list(found.values())
