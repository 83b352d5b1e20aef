"""`moe-triton tune --cpu`: times the products of this CPU, and keeps the fastest policy in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer

from moe_triton.backends.torch.cpu import policy_path, read_policies
from moe_triton.backends.torch.processor import this_processor
from moe_triton.benchmarking.cpu_tuning import CASES, TIE, Tuned, keep, tune_cpu
from moe_triton.benchmarking.environment import now
from moe_triton.benchmarking.text_tables import plain_console, print_table
from moe_triton.cli import arguments
from moe_triton.cli.arguments import EXIT_FAULT, EXIT_INTERRUPTED, checked, fail
from moe_triton.cli.display import StepDisplay


def run_tune_cpu(ctx: typer.Context, file: Path | None, budget: float, threads: int | None) -> dict[str, Any]:
    """Time every policy, print what was found, and keep it; returns that as plain values."""
    path = file or policy_path()
    with checked("tune", path.parent):
        arguments.check_settings(budget, threads, 0, [])
        if path.is_dir():
            raise ValueError(f"table: {path} is a directory, wanted a file")
        arguments.make_directory(path.parent, "table")
        arguments.lock(ctx, path, "table")
        if path.exists():
            read_policies(path)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with StepDisplay(len(CASES), budget / len(CASES)) as step:
            found = tune_cpu(budget, on_step=step)
        keep(found, path, now())
    except KeyboardInterrupt:
        fail("tune", "interrupted; nothing was written", EXIT_INTERRUPTED)
    except OSError as error:
        fail("tune", f"cannot write to {path.parent}: {error.strerror}; what was there before is intact", EXIT_FAULT)
    print_tuned(found, path)
    ratios = {policy: found.ratio(policy) for policy in found.times}
    return {"policy": found.policy, "times_the_tables": ratios, "file": str(path)}


def print_tuned(found: Tuned, path: Path) -> None:
    console = plain_console()
    title = f"{this_processor()}, {torch.get_num_threads()} threads: time over {found.table}'s, forward+backward"
    rows = [
        (case.title(), *(f"{times[index]:.2f}" for times in found.times.values())) for index, case in enumerate(CASES)
    ]
    rows.append(("all", *(f"{found.ratio(policy):.2f}" for policy in found.times)))
    print_table(console, ("shape", *found.times), rows, text=("shape",), title=title)
    why = "the table's" if found.policy == found.table else f"{1 / found.ratio(found.policy):.2f} times as fast"
    console.print(
        f"{found.policy} ({why}; another one has to be {TIE:g} times as fast) is kept in {path}, for this processor, "
        "these threads and this torch.",
        highlight=False,
        soft_wrap=True,
    )
