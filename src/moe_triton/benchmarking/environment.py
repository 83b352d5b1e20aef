"""Where and with what a result was measured: device, versions, commit, and a digest of our source."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from moe_triton.backends.torch.processor import this_processor
from moe_triton.runtime import installed_version

VERSIONS = (
    "moe-triton", "torch", "triton", "transformers", "deepspeed", "scattermoe", "liger-kernel", "triton_kernels",
    "sonicmoe", "megablocks",
)  # fmt: skip
SOURCES = ("moe_triton", "moe_triton_kernels")


def devices() -> list[dict[str, Any]]:
    """Every device that tensors can lie on here, the CPU first."""
    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": this_processor().name,
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "instruction_sets": list(this_processor().instruction_sets),
        }
    ]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = round(gpu.total_memory / 2**30, 1)
        capability = f"{gpu.major}.{gpu.minor}"
        found.append({"device": f"cuda:{index}", "name": gpu.name, "memory_gib": memory, "capability": capability})
    return found


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def environment(device: torch.device) -> dict[str, Any]:
    """Where and when a result was measured."""
    name = "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"
    versions = {"python": platform.python_version(), **{name: installed_version(name) for name in VERSIONS}}
    if device.type == "cuda" and versions["triton"] is not None:
        from moe_triton_kernels.compiler import ptxas_version  # needs Triton
        from moe_triton_kernels.launch import target_of

        versions["ptxas"] = ptxas_version(target_of(device).architecture)
    return {
        "created": now(),
        "device": next(found for found in devices() if found["device"] == name),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "commit": commit(),
    }


def commit() -> dict[str, Any] | None:
    """The commit of this very source file, and whether anything differs from it.

    Outside a repository, what MOE_TRITON_COMMIT says (`git describe --always --abbrev=40 --dirty`), or None.
    """
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        command = ["git", "--no-optional-locks", "-C", str(here.parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    # an installed copy may lie inside somebody else's repository: only a tracked file counts
    if git("ls-files", "--error-unmatch", here.name) is None:
        given, is_dirty, _ = os.environ.get("MOE_TRITON_COMMIT", "").partition("-dirty")
        return {"hash": given, "dirty": bool(is_dirty)} if given else None
    found, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return None if found is None else {"hash": found, "dirty": bool(changes)}


def source_digest() -> str:
    """A digest of our Python files and shipped tables: results of other code are never taken for this code's."""
    digest = hashlib.sha256()
    for package in SOURCES:
        found = importlib.util.find_spec(package)
        for folder in (found.submodule_search_locations or []) if found is not None else []:
            for path in sorted(Path(folder).rglob("*")):
                if path.suffix in (".py", ".json"):
                    digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def caption(environment: dict[str, Any]) -> str:
    """Device, versions and commit in one line."""
    device, versions, commit = environment["device"], environment["versions"], environment["commit"]
    parts = [device["name"]]
    if device.get("threads"):
        parts.append(f"{device['threads']} thread{'s' if device['threads'] > 1 else ''}")
    parts += [f"{name} {found}" for name, found in versions.items() if found is not None]
    if commit is not None:
        parts.append(f"commit {commit['hash'][:10]}{' with changes' if commit['dirty'] else ''}")
    return ", ".join([*parts, environment["created"]])
