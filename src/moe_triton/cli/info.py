"""`moe-triton info`: versions, devices, and which backend would run for each dtype, with the reason."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import sys
from typing import Annotated, Any

import torch
import typer

from moe_triton import runtime

PACKAGES = ("moe-triton", "torch", "triton", "transformers", "deepspeed", "einops", "numpy", "safetensors")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's model name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def devices() -> list[dict[str, Any]]:
    """Every device that tensors can lie on here, the CPU first."""
    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": cpu_name(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append(
                {
                    "device": f"cuda:{index}",
                    "name": properties.name,
                    "memory_gib": round(properties.total_memory / 2**30, 1),
                    "capability": f"{properties.major}.{properties.minor}",
                }
            )
    return found


def collect() -> dict[str, Any]:
    """Everything that `info` prints, as one nested dict of plain values."""
    found = devices()
    paths = []
    for device in found:
        for dtype in DTYPES:
            choice = runtime.choose("auto", torch.device(device["device"]), dtype)
            paths.append(
                {
                    "device": device["device"],
                    "dtype": str(dtype).removeprefix("torch."),
                    "backend": choice.name,
                    "reason": choice.reason,
                }
            )
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "platform": f"{platform.system()} {platform.machine()}",
        "triton_interpreter": runtime.interpreting(),
        "devices": found,
        "backends": paths,
    }


def info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Versions, devices, and which backend would run for each dtype, and why."""
    facts = collect()
    if as_json:
        json.dump(facts, sys.stdout, indent=2)
        print()
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    versions = Table("package", "version", title="Versions")
    for name, found in facts["versions"].items():
        versions.add_row(name, found or "not installed")
    console.print(versions)
    hardware = Table("device", "name", "capability", title=f"Devices ({facts['platform']})")
    for device in facts["devices"]:
        hardware.add_row(device["device"], device["name"], device["capability"])
    console.print(hardware)
    paths = Table("device", "dtype", "backend", "why", title="What backend='auto' runs")
    for path in facts["backends"]:
        paths.add_row(path["device"], path["dtype"], path["backend"], path["reason"])
    console.print(paths)
    if facts["triton_interpreter"]:
        console.print("TRITON_INTERPRET is set: backend='triton' runs the kernels on CPU tensors, slowly.")
