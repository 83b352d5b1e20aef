"""Which block sizes a grouped kernel runs with: tables of measured entries (the user's, then the shipped one), and a
heuristic behind them.

A configuration is keyed by (op, d, n, dtype, architecture, bucket of rows per expert). Rows per expert is the average
S / E of the static sizes: it is known without asking the device and takes few values, so neither a host sync nor a
recompilation follows from a new number of tokens. Nothing is tuned at run time: every rank picks the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_triton_kernels.compiler import compiler_versions
from moe_triton_kernels.heuristics import BUCKETS, heuristic, over_codes
from moe_triton_kernels.launch import Config

OPS = ("up_gated", "up", "down", "d_hidden_gated", "d_hidden", "d_rows", "d_weight")
TABLE = Path(__file__).with_name("configs.json")


def bucket_of(rows_per_expert: float) -> int:
    """The smallest bucket that holds the average number of rows per expert; the last one is open-ended."""
    for bucket in BUCKETS:
        if rows_per_expert <= bucket:
            return bucket
    return BUCKETS[-1]


@cache
def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Entry(NamedTuple):
    """What a table says: a configuration, and the versions that it was measured under ({} where nobody wrote them)."""

    config: Config
    versions: Mapping[str, str | None]


class Table(dict[tuple[Any, ...], Entry]):
    """Entries by KEYS; hashed as itself, so that what was found in it can be looked up."""

    __hash__ = object.__hash__  # type: ignore[assignment]


KEYS = ("op", "d", "n", "dtype", "architecture", "bucket")


def read_table(path: Path) -> Table:
    """A table file, a JSON list of objects with KEYS and "config"; ValueError, naming the file, where it is broken."""
    try:
        entries = json.loads(path.read_text())
        return Table(
            {
                tuple(entry[key] for key in KEYS): Entry(
                    Config(**entry["config"]), entry.get("measured", {}).get("versions", {})
                )
                for entry in entries
            }
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"table {path}: {type(error).__name__}: {error}") from error


@lru_cache
def shipped_table() -> Table:
    """configs.json, which comes with the kernels."""
    return read_table(TABLE)


def user_table_path() -> Path | None:
    """Where this user's own table lies, as `moe-triton tune` writes it.

    MOE_TRITON_TABLE names it (empty: none is read); else it is moe_triton/configs.json under $XDG_CONFIG_HOME, which
    is ~/.config by default.
    """
    named = os.environ.get("MOE_TRITON_TABLE")
    if named is not None:
        return Path(named) if named else None
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "moe_triton" / "configs.json"


@lru_cache
def user_table() -> Table:
    """The user's own table, which goes before the shipped one; read once. Empty where there is none."""
    path = user_table_path()
    if path is None or (not path.exists() and "MOE_TRITON_TABLE" not in os.environ):
        return Table()
    return read_table(path)


class Found(NamedTuple):
    """A configuration, where it is from ("user table", "shipped table" or "heuristic"), and `Entry.versions`."""

    config: Config
    origin: str
    versions: Mapping[str, str | None]

    def stale(self, architecture: str) -> str:
        """Under what else than this compiler it was tuned, in words; "" where that is not known to differ."""
        here = compiler_versions(architecture)
        differs = [name for name, version in here.items() if self.versions.get(name) not in (None, version)]
        there = " and ".join(f"{name} {self.versions[name]}" for name in differs)
        return there and f"tuned under {there}, here {' and '.join(f'{name} {here[name]}' for name in differs)}"


def operands(dtype: str, format: str | None) -> str:
    """What a product multiplies, as tables name it: a dtype, and the format of the codes that its loop decodes."""
    return dtype if format is None else f"{dtype} {format}"


def find_config(
    op: str,
    *,
    d: int,
    n: int,
    dtype: torch.dtype,
    num_rows: int,
    num_experts: int,
    architecture: str,
    format: str | None = None,
) -> Found:
    """The configuration for this case and where it is from.

    format: of the codes that the product decodes in its loop. Where no table has an entry for them, it runs with what
    `over_codes` makes of the configuration of the same product without.
    ValueError on an unknown op, and on a table that is broken.
    """
    bucket = bucket_of(num_rows / (num_experts or 1))
    return _find(user_table(), shipped_table(), op, d, n, dtype, architecture, bucket, format)


@lru_cache(maxsize=4096)
def _find(
    users: Table,
    shipped: Table,
    op: str,
    d: int,
    n: int,
    dtype: torch.dtype,
    architecture: str,
    bucket: int,
    format: str | None,
) -> Found:
    if op not in OPS:
        raise ValueError(f"op: got {op!r}, wanted one of {', '.join(OPS)}")
    for name in dict.fromkeys((format, None)):
        key = (op, d, n, operands(dtype_name(dtype), name), architecture, bucket)
        for table, origin in ((users, "user table"), (shipped, "shipped table")):
            if key in table:
                config = table[key].config if name == format else over_codes(op, table[key].config)
                return Found(config, origin, table[key].versions)
    config = heuristic(op, d, n, dtype.itemsize, architecture, bucket)
    return Found(config if format is None else over_codes(op, config), "heuristic", {})


def choose_config(
    op: str,
    *,
    d: int,
    n: int,
    dtype: torch.dtype,
    num_rows: int,
    num_experts: int,
    architecture: str,
    format: str | None = None,
) -> Config:
    """`find_config` without the origin."""
    return find_config(
        op, d=d, n=n, dtype=dtype, num_rows=num_rows, num_experts=num_experts, architecture=architecture, format=format
    ).config
