"""How stages are shown: a table, and what follows from it in words."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from moe_triton.benchmarking.report import milliseconds, spread_cell, three_digits
from moe_triton.benchmarking.stages import PASSES, StageRow, StageTable, middle
from moe_triton.benchmarking.text_tables import plain_console, print_table

STAGE_HEADER = ("stage", "ms", "share", "GFLOP", "MB", "floor ms", "of floor", "kernel, configuration")


def stage_cells(row: StageRow) -> list[str]:
    """A stage's line in the table; without times it says why."""
    if row.time_s is None or row.floor_s is None or row.of_floor is None:
        return [row.full_name, "not measured", "", "", "", "", "", row.note]
    return [
        row.full_name,
        spread_cell(row.time_s),
        "" if row.share is None else f"{row.share:.1%}",
        three_digits((row.flops or 0) / 1e9),
        three_digits((row.bytes or 0) / 1e6),
        milliseconds(row.floor_s),
        f"{row.of_floor.p50:.2f}",
        f"{row.kernel} {row.config}".strip(),
    ]


def stage_summary(table: StageTable) -> list[str]:
    """How the stages add up to the layer, and the one to work on."""
    lines = []
    for is_backward, name in PASSES.items():
        own = [middle(row.time_s) for row in table.stages if row.is_backward == is_backward and row.time_s is not None]
        if own and name in table.layer_s:
            whole = table.layer_s[name].p50
            lines.append(f"{name}: {milliseconds(whole)} ms; its stages one by one: {milliseconds(sum(own))} ms")
    furthest = table.furthest
    if furthest is not None and furthest.time_s is not None and furthest.floor_s is not None:
        above = furthest.time_s.p50 - furthest.floor_s
        lines.append(
            f"furthest from its floor: {furthest.full_name}, {milliseconds(furthest.time_s.p50)} ms where its FLOPs "
            f"and bytes need {milliseconds(furthest.floor_s)} ms ({milliseconds(max(above, 0.0))} ms to gain)"
        )
    return lines


def print_stages(tables: Sequence[StageTable], console: Console | None = None) -> None:
    """Every stage of our layer beside its floor, and what follows from it."""
    console = plain_console() if console is None else console
    for found in tables:
        console.print(f"stages: {found.title}", highlight=False, soft_wrap=True)
        rows = [stage_cells(row) for row in found.stages]
        print_table(console, STAGE_HEADER, rows, (STAGE_HEADER[0], STAGE_HEADER[-1]), less=("GFLOP", "MB"))
        console.print("\n".join(stage_summary(found)), highlight=False, soft_wrap=True)
        console.print()
