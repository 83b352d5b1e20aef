"""What a run is measured on: the device, its two limits, the assemblers, and the tools of the machine."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from gpu_benches.limits import COPY, COPY_BYTES, DENSE, DENSE_SIZE, limit_calls, measured_device
from gpu_checks.setting import Setting

from moe_triton.benchmarking.timing import make_timer, run_rounds
from moe_triton_kernels.compiler import ptxas_version, triton_version

TOOLS = ("ncu", "compute-sanitizer", "nvcc", "cuobjdump")
QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,memory.total,ecc.mode.current"


@lru_cache
def version_of(ptxas: str) -> str | None:
    """ "12.8.93" of an assembler; None where it does not run."""
    try:
        said = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"V(\d+(?:\.\d+)+)", said)
    return None if found is None else found.group(1)


def torch_ptxas() -> Path | None:
    """The assembler that comes with torch. torch.compile makes Triton use it, for everything compiled after it."""
    path = Path(torch.__file__).parent / "bin" / "ptxas"
    return path if path.is_file() else None


def capability() -> tuple[int, int]:
    """Of this GPU; Hopper's where there is none."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)


def assembler() -> str | None:
    """The version of the assembler that Triton uses at this moment for this GPU."""
    try:
        return ptxas_version("sm_{}{}".format(*capability()))
    except (RuntimeError, AttributeError):  # Triton found none
        return None


def torch_replaces_assembler() -> bool:
    """Whether what torch.compile sets counts for this GPU: it names the older one of Triton's two assemblers."""
    return capability() < ((9, 0) if triton_version() >= (3, 9) else (10, 0))


def tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")


def nvidia_smi() -> str:
    """The figures of QUERY, or "" where there is no nvidia-smi."""
    program = tool("nvidia-smi")
    if program is None:
        return ""
    command = [program, f"--query-gpu={QUERY}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()


def own_assembler() -> dict[str, str]:
    """What makes every process use Triton's assembler: torch.compile leaves an environment alone that names one.

    Otherwise what is compiled after it comes from torch's, and nothing that was compiled before is found in the cache.
    """
    from triton import knobs

    return {"TRITON_PTXAS_PATH": knobs.nvidia.ptxas.path}


def facts(setting: Setting) -> dict[str, Any]:
    """The device's own words, the speed of a dense product and of a copy, assemblers and tools."""
    setting.need_gpu()
    gpu = torch.cuda.get_device_properties(setting.device)
    calls = limit_calls(setting.device, torch.bfloat16, size=DENSE_SIZE, copied=COPY_BYTES)
    times = run_rounds(calls, make_timer(setting.device), budget_s=2.0)
    here = measured_device(gpu.name, times, size=DENSE_SIZE, copied=COPY_BYTES)
    other = torch_ptxas()
    return {
        "note": f"{here.flops_16 / 1e12:.0f} TFLOP/s, {here.bandwidth / 1e12:.2f} TB/s",
        "dense_flops": here.flops_16,
        "copy_bytes_s": here.bandwidth,
        "rounds": {name: len(times[name]) for name in (DENSE, COPY)},
        "nvidia_smi": nvidia_smi(),
        "multiprocessors": gpu.multi_processor_count,
        "memory_bytes": gpu.total_memory,
        "l2_bytes": gpu.L2_cache_size,
        "assemblers": {"triton": assembler(), "torch": None if other is None else version_of(str(other))},
        "tools": {name: tool(name) for name in TOOLS},
    }
