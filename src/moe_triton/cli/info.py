"""`moe-triton info`: versions, devices, and which backend would run for each dtype, with the reason."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

from moe_triton import runtime
from moe_triton.backends.torch.cpu import choose_policy
from moe_triton.backends.torch.fused import loops_in_words
from moe_triton.backends.torch.processor import this_processor
from moe_triton.benchmarking.environment import devices
from moe_triton.benchmarking.text_tables import plain_console, print_table
from moe_triton.cli.arguments import EXIT_FAULT, fail
from moe_triton.distributed.exchange.deep_ep import deep_ep_problem
from moe_triton.runtime import installed_version
from moe_triton.torch_internals import symmetric_memory_problem

PACKAGES = ("moe-triton", "torch", "triton", "transformers", "deepspeed", "einops", "numpy", "numba", "safetensors")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


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
        "versions": {"python": platform.python_version(), **{name: installed_version(name) for name in PACKAGES}},
        "platform": f"{platform.system()} {platform.machine()}",
        "triton_interpreter": runtime.interpreting(),
        "devices": found,
        "backends": paths,
        "tables": tables(found),
        "cpu_policy": cpu_policy(),
        "cpu_loops": loops_in_words(),
        "exchanges": exchanges(),
    }


def exchanges() -> dict[str, str | None]:
    """What can move rows under expert parallelism here: the name in `moe_triton.distributed`, and why it cannot run."""
    return {
        "the package's own, over torch.distributed": None if dist.is_available() else "torch has no torch.distributed",
        "DeepEP": deep_ep_problem(),
        "SymmetricMemory": symmetric_memory_problem(torch.device("cuda")),
    }


def cpu_policy() -> dict[str, str]:
    """Which products the torch backend makes on this CPU, and why; where a file of policies is broken: "error"."""
    try:
        return choose_policy(this_processor())._asdict()
    except ValueError as error:
        return {"error": str(error)}


def tables(found: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Where kernel configurations come from here: the user's table and the shipped one; None without Triton.

    Where the user's table is broken: only "error", which says so.
    """
    if not runtime.TRITON_INSTALLED:
        return None
    from moe_triton.kernel_stages import table_facts  # needs Triton
    from moe_triton_kernels.configs import user_table
    from moe_triton_kernels.launch import target_of

    try:
        user_table()
    except ValueError as error:
        return {"error": str(error)}
    gpus = [torch.device(device["device"]) for device in found if device["device"] != "cpu"]
    architectures = sorted({target_of(device).architecture for device in gpus})
    return {"architectures": architectures, **table_facts(architectures)}


def tables_line(facts: dict[str, Any]) -> str:
    """What `moe-triton tune` and the shipped table contribute on this machine."""
    where = facts["user_table"] or "switched off (MOE_TRITON_TABLE is empty)"
    if not facts["architectures"]:
        return f"Kernel configurations: no GPU here. The user's table would be read from {where}."
    gluon = f"Warp-specialized kernels (Gluon) run in {facts['gluon_entries']} of them."
    if facts["gluon_error"] is not None:
        gluon = f"Warp-specialized kernels (Gluon) cannot run: {facts['gluon_error']}."
    elif facts["cluster_error"] is not None:
        gluon += f" None of them in clusters: {facts['cluster_error']}."
    return (
        f"Kernel configurations for {', '.join(facts['architectures'])}: {facts['user_entries']} entries in the user's "
        f"table ({where}), {facts['shipped_entries']} in the shipped one, the heuristic for everything else. {gluon}"
    )


def info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Versions, devices, and which backend would run for each dtype, and why.

    Exit code: 0; 1 when the user's table of kernel configurations, or of policies of CPUs, is broken.
    """
    facts = collect()
    if as_json:
        json.dump(facts, sys.stdout, indent=2)
        print()
    else:
        print_facts(facts)
    if "error" in facts["cpu_policy"]:
        fail("info", facts["cpu_policy"]["error"], EXIT_FAULT)
    if facts["tables"] is not None and "error" in facts["tables"]:
        fail("info", f"kernel configurations: {facts['tables']['error']}", EXIT_FAULT)


def print_facts(facts: dict[str, Any]) -> None:
    console = plain_console()

    def show(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
        print_table(console, columns, rows, text=columns, title=title)

    versions = [(name, found or "not installed") for name, found in facts["versions"].items()]
    show("Versions", ("package", "version"), versions)
    hardware = [(d["device"], d["name"], ", ".join(d.get("instruction_sets", [])) or d["capability"])
                for d in facts["devices"]]  # fmt: skip
    show(f"Devices ({facts['platform']})", ("device", "name", "capability"), hardware)
    paths = [(path["device"], path["dtype"], path["backend"]) for path in facts["backends"]]
    show("What backend='auto' runs", ("device", "dtype", "backend"), paths)
    for reason in dict.fromkeys(path["reason"] for path in facts["backends"]):
        where = [f"{p['device']} {p['dtype']}" for p in facts["backends"] if p["reason"] == reason]
        console.print(f"  {', '.join(where)}: {reason}", highlight=False)
    if "error" not in facts["cpu_policy"]:
        policy = facts["cpu_policy"]
        line = f"Products on the CPU: {policy['policy']} ({policy['reason']})."
        console.print(line, highlight=False, soft_wrap=True)
    line = f"Compiled loops on the CPU: {facts['cpu_loops']}."
    console.print(line, highlight=False, soft_wrap=True)
    if facts["tables"] is not None and "error" not in facts["tables"]:
        console.print(tables_line(facts["tables"]), highlight=False, soft_wrap=True)
    words = [f"{name}: {problem or 'can run'}" for name, problem in facts["exchanges"].items()]
    console.print(f"Exchanges of expert parallelism: {'; '.join(words)}.", highlight=False, soft_wrap=True)
    if facts["triton_interpreter"]:
        console.print("TRITON_INTERPRET is set: backend='triton' runs the kernels on CPU tensors, slowly.")
