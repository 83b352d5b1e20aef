"""The stages that kernels run, and their configurations: which runs, where it is from, how many a table has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import torch

from moe_triton.records import ExpertSpec
from moe_triton_kernels.configs import find_config, shipped_table, user_table, user_table_path
from moe_triton_kernels.gluon.schedules import BLOCK_K, cluster_error, compile_error, import_error, schedule_of
from moe_triton_kernels.heuristics import BUCKETS, decodes_in_loop
from moe_triton_kernels.launch import MAX_REGISTERS, Config

# operation that has configurations -> the stages that run with its configuration
STAGES_OF = {
    "up": ("up",),
    "down": ("down",),
    "d_hidden": ("d_hidden",),
    "d_weight": ("d_weight_down", "d_weight_up"),
    "d_rows": ("d_rows",),
}
OP_OF = {stage: op for op, stages in STAGES_OF.items() for stage in stages}
KERNELS = {
    "tile_tables": "tile_tables_kernel",
    "up": "up_kernel",
    "down": "down_kernel",
    "combine": "combine_kernel",
    "d_hidden": "d_hidden_kernel",
    "d_router_weights": "d_router_weights_kernel",
    "d_weight_down": "d_weight_kernel",
    "d_weight_up": "d_weight_kernel",
    "d_rows": "down_kernel",
    "combine_backward": "combine_kernel",
    "d_bias_rows": "d_bias_kernel",
    "d_bias_gathered": "d_bias_kernel",
}
FORWARD = ("tile_tables", "up", "down", "combine")
OVER_CODES = {"up": "W1", "down": "W2", "d_hidden": "W2", "d_rows": "W1"}  # what reads projections, and which


def in_words(config: Config | Mapping[str, Any]) -> str:
    """Return "128x256x64 warps 8 stages 3", and what else is not 1, or switched on, or limited.

    With a warp-specialized schedule, what that reads: "gluon ping_pong 128x128x64 stages 6 group 8".
    """
    config = Config(**config) if isinstance(config, Mapping) else config
    if config.gluon is not None:
        schedule = schedule_of(config.gluon)
        blocks = f"{schedule.block_m}x{schedule.block_n}x{BLOCK_K} stages {schedule.stages}"
        return f"gluon {config.gluon} {blocks} group {config.group}"
    text = f"{config.block_m}x{config.block_n}x{config.block_k} warps {config.num_warps} stages {config.num_stages}"
    known = ("block_m", "block_n", "block_k", "num_warps", "num_stages", "gluon")
    for name, value in ((f.name, getattr(config, f.name)) for f in fields(config) if f.name not in known):
        if isinstance(value, bool):
            text += f" {name}" if value else ""
        elif value not in (1, MAX_REGISTERS):
            text += f" {name} {value}"
    return text


def full_name(op: str, is_gated: bool) -> str:
    """The name that an operation has in tables: gated up and d_hidden have their own."""
    return f"{op}_gated" if is_gated and op in ("up", "d_hidden") else op


def chosen_config(
    op: str, d: int, n: int, dtype: torch.dtype, bucket: int, architecture: str, format: str | None
) -> Config:
    """What runs an operation (by its name in tables) today, for experts with about `bucket` rows each."""
    return find_config(
        op, d=d, n=n, dtype=dtype, num_rows=bucket, num_experts=1, architecture=architecture, format=format
    ).config


def chosen_configs(
    *,
    d: int,
    n: int,
    dtype: torch.dtype,
    num_rows: int,
    num_experts: int,
    is_gated: bool,
    architecture: str,
    format: str | None = None,
) -> list[dict[str, Any]]:
    """For every operation: stages, configuration in words and as a dict, and where it is from.

    format: of the codes that those of OVER_CODES decode in their loop.

    Of a table's entry that was tuned under another Triton or ptxas than what compiles here, it says so.
    """
    found = []
    for op, stages in STAGES_OF.items():
        config, origin, _ = chosen = find_config(
            full_name(op, is_gated), d=d, n=n, dtype=dtype, num_rows=num_rows, num_experts=num_experts,
            architecture=architecture, format=format if op in OVER_CODES else None,
        )  # fmt: skip
        source = ", ".join(filter(None, (origin, chosen.stale(architecture))))
        found.append({"op": op, "stages": stages, "config": in_words(config), "fields": asdict(config), "from": source})
    return found


def decoded_in_loop(
    format: str, spec: ExpertSpec, dtype: torch.dtype, *, n: int, block: int, rows_per_expert: float
) -> list[str]:
    """Return those of OVER_CODES whose kernels decode quantised projections in their loop.

    block: columns of the up projection that share a scale.
    """
    found = []
    for op in OVER_CODES:
        is_fixed = spec.batch_invariant and op in ("up", "down")
        rows = BUCKETS[-1] + 1 if is_fixed else rows_per_expert
        half = n if op == "up" and spec.is_gated and spec.is_concatenated else None
        if decodes_in_loop(format, rows, dtype.itemsize, block=block, half=half):
            found.append(op)
    return found


def decoding_in_words(in_loop: Sequence[str]) -> str:
    """Where the kernels decode quantised projections."""
    in_memory = [op for op in OVER_CODES if op not in in_loop]
    words = [f"decoded in the main loop of {', '.join(in_loop)}"] if in_loop else []
    words += [f"decoded to memory for every {', '.join(in_memory)}"] if in_memory else []
    return "; ".join(words)


def table_facts(architectures: Sequence[str]) -> dict[str, Any]:
    """Where the tables are and how many entries they have for these architectures."""
    path = user_table_path()
    entries = {
        name: [entry.config for key, entry in table.items() if key[4] in architectures]
        for name, table in (("user", user_table()), ("shipped", shipped_table()))
    }
    schedules = [config.gluon for configs in entries.values() for config in configs if config.gluon is not None]
    return {
        "user_table": None if path is None else str(path),
        "user_entries": len(entries["user"]),
        "shipped_entries": len(entries["shipped"]),
        "gluon_entries": len(schedules),
        "gluon_error": import_error(),
        "cluster_error": cluster_error(),
    }


def kernel_in_words(kernel: str, config: Mapping[str, Any] | None) -> str:
    """Return the kernel's name, as the one in Gluon where the configuration (None: it has none) names a schedule."""
    if config is None or config["gluon"] is None:
        return kernel
    error = compile_error(config["gluon"])
    return f"gluon.{kernel}" if error is None else f"{kernel} (this Triton's Gluon does not do: {error})"
