"""What is known of configurations: which runs and where it is from, which ship, which lie one step away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moe_triton.backends.triton.experts import Problem
from moe_triton.backends.triton.stages import FORWARD, KERNELS, STAGES_OF, in_words
from moe_triton_kernels.configs import bucket_of, find_config, read_table, user_table, user_table_path
from moe_triton_kernels.configs import shipped_table as read_shipped_table
from moe_triton_kernels.heuristics import heuristic
from moe_triton_kernels.launch import Config, target_of
from moe_triton_kernels.tools.search import neighbours
from moe_triton_kernels.tools.shipped import TYPES, shipped_configs

__all__ = [
    "FORWARD",
    "KERNELS",
    "Config",
    "bucket_of",
    "heuristic",
    "in_words",
    "neighbours",
    "target_of",
    "user_table",
    "user_table_path",
]


def full_name(op: str, is_gated: bool) -> str:
    """The name that an operation has in tables: gated up and d_hidden have their own."""
    return f"{op}_gated" if is_gated and op in ("up", "d_hidden") else op


def shipped_for(problem: Problem, op: str) -> list[Config]:
    """Every configuration that ships for an operation on the problem's device, in its dtype (fp16 shares bf16's)."""
    architecture = target_of(problem.device).architecture
    name, dtype = full_name(op, problem.spec.is_gated), TYPES.get(problem.dtype, "bf16")
    return [s.config for s in shipped_configs(architecture) if s.op == name and s.dtype == dtype]


def chosen_config(op: str, d: int, n: int, dtype: torch.dtype, bucket: int, architecture: str) -> Config:
    """What runs an operation (by its name in tables) today, for experts with about `bucket` rows each."""
    return find_config(op, d=d, n=n, dtype=dtype, num_rows=bucket, num_experts=1, architecture=architecture)[0]


def check_table(path: Path) -> None:
    """ValueError, naming the file, where a table is broken."""
    read_table(path)


def chosen_configs(
    *, d: int, n: int, dtype: torch.dtype, num_rows: int, num_experts: int, is_gated: bool, architecture: str
) -> list[dict[str, Any]]:
    """For every operation: stages, configuration in words and as a dict, and where it is from."""
    found = []
    for op, stages in STAGES_OF.items():
        config, origin = find_config(
            full_name(op, is_gated), d=d, n=n, dtype=dtype, num_rows=num_rows, num_experts=num_experts,
            architecture=architecture,
        )  # fmt: skip
        found.append({"op": op, "stages": stages, "config": in_words(config), "fields": asdict(config), "from": origin})
    return found


def table_facts(architectures: Sequence[str]) -> dict[str, Any]:
    """Where the tables are and how many entries they have for these architectures."""
    path = user_table_path()
    counts = {
        name: sum(key[4] in architectures for key in table)
        for name, table in (("user", user_table()), ("shipped", read_shipped_table()))
    }
    return {"user_table": None if path is None else str(path), "user_entries": counts["user"],
            "shipped_entries": counts["shipped"]}  # fmt: skip
