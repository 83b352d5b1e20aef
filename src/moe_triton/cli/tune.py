"""`moe-triton tune`: searches faster configurations of the kernels for given shapes, and keeps them in a table."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from moe_triton import runtime
from moe_triton.benchmarking.cases import Case
from moe_triton.benchmarking.environment import environment, source_digest
from moe_triton.benchmarking.text_tables import plain_console, print_table
from moe_triton.cli import arguments
from moe_triton.cli.arguments import EXIT_FAULT, EXIT_INTERRUPTED, EXIT_NO_GPU, SHAPE, Unmeasurable, checked, fail
from moe_triton.cli.display import StepDisplay
from moe_triton.cli.inspect import ARCHITECTURES

if TYPE_CHECKING:
    from moe_triton.benchmarking.tuning import Problem, Progress, Settings


def tune(
    ctx: typer.Context,
    suite: Annotated[str | None, typer.Option(help="Shapes by name: see `moe-triton bench --list`.")] = None,
    tokens: arguments.Tokens = None,
    hidden: arguments.Hidden = None,
    intermediate: arguments.Intermediate = None,
    experts: arguments.NumExperts = None,
    top_k: arguments.TopK = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16, or several with commas.")] = None,
    format: arguments.Format = None,
    ops: Annotated[
        str | None, typer.Option(help="up, down, d_hidden, d_weight, d_rows, or several. Default: all.")
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds for the whole search.")] = 600.0,
    candidate_s: Annotated[float, typer.Option("--candidate-seconds", help="Seconds of timing per candidate.")] = 0.5,
    table: Annotated[
        Path | None, typer.Option(help="The table. Default: $MOE_TRITON_TABLE or ~/.config/moe_triton/configs.json.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cuda:N; cpu only in Triton's interpreter.")] = "auto",
    arch: Annotated[str, typer.Option(help=f"With --dry-run: {', '.join(ARCHITECTURES)}.")] = "sm_90",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="List the first candidates and what they compile to; needs no GPU."),
    ] = False,
    cpu: Annotated[
        bool,
        typer.Option("--cpu", help="Time this CPU's products instead, and keep the fastest policy; needs no GPU."),
    ] = False,
    threads: arguments.Threads = None,
    seed: arguments.Seed = 0,
    as_json: arguments.AsJson = False,
) -> None:
    """Search faster kernel configurations for given shapes, verify them, and keep the faster ones in a table.

    The search goes on where it was when the same command is given again. The library reads the table from its default
    place, or from the file that MOE_TRITON_TABLE names. With --cpu the products of this CPU are timed instead; the
    file is --table, $MOE_TRITON_CPU_POLICY or ~/.config/moe_triton/cpu.json.
    Exit code: 0; 1 when a file cannot be written; 2 for bad arguments; 3 when a GPU is needed.
    """
    give = ctx.with_resource(arguments.json_instead(as_json))
    if cpu:
        from moe_triton.cli.tune_cpu import run_tune_cpu

        give(run_tune_cpu(ctx, table, budget, threads))
        return
    if not runtime.TRITON_INSTALLED:
        fail("tune", "Triton is not installed: there is nothing to tune", EXIT_NO_GPU)
    from moe_triton.benchmarking import tuning
    from moe_triton.kernel_stages import STAGES_OF

    shape = dict(zip(SHAPE, (tokens, hidden, intermediate, experts, top_k), strict=True))
    with checked("tune"):
        where = arguments.pick_device(device)
        is_given = suite is not None or any(value is not None for value in shape.values())
        if not is_given and not dry_run:
            raise ValueError(f"suite: missing; name one (see moe-triton bench --list), or give {', '.join(shape)}")
        # here or not: a dry run needs no GPU
        cases = arguments.pick_cases(suite if is_given else "models", shape, dtype, {}, torch.device("cuda"))
        cases = arguments.with_formats(cases if is_given else cases[:1], format)
        names = list(STAGES_OF) if ops is None else arguments.pick_several(ops, "ops", tuple(STAGES_OF))
        arguments.check_settings(budget, threads, seed, [])
        if not 0 <= candidate_s < float("inf"):
            raise ValueError(f"candidate-seconds: got {candidate_s}, wanted seconds >= 0")
        if dry_run:
            arguments.pick(arch, "arch", ARCHITECTURES, arch)
            give(dry(tuning.problems_of(cases, names, arch), budget))
            return
        architecture = measurable(where, cases)
        problems = tuning.problems_of(cases, names, architecture)
        path = table_path(table)
        arguments.lock(ctx, path, "table")
        entries = tuning.read_table(path)
        facts = environment(where)
        circumstances = {"device": facts["device"]["name"], "source": source_digest(), "candidate_s": candidate_s}
        circumstances |= {name: facts["versions"].get(name) for name in ("torch", "triton", "ptxas")}
        progress = tuning.Progress(path=path.with_suffix(".progress.json"), circumstances=circumstances)
        progress.load()
    settings = tuning.Settings(device=where, seed=seed, threads=threads, candidate_s=candidate_s)
    try:
        give({"table": str(path), "entries": run(problems, progress, settings, budget, path, entries, facts)})
    except KeyboardInterrupt:
        fail("tune", f"interrupted; the same command goes on from {progress.path}", EXIT_INTERRUPTED)
    except OSError as error:
        fail("tune", f"cannot write to {path.parent}: {error.strerror}; what was there before is intact", EXIT_FAULT)


def measurable(device: torch.device, cases: list[Case]) -> str:
    """The architecture that is tuned for. Unmeasurable where the kernels cannot run."""
    try:
        runtime.choose("triton", device, cases[0].torch_dtype)
    except RuntimeError as error:
        raise Unmeasurable(f"{error}; --dry-run needs none") from error
    from moe_triton_kernels.launch import target_of  # needs Triton

    return target_of(device).architecture


def table_path(given: Path | None) -> Path:
    """Where the table is written, its folder made; ValueError where that cannot be."""
    from moe_triton_kernels.configs import user_table_path  # needs Triton

    path = given or user_table_path()
    if path is None:
        raise ValueError("table: MOE_TRITON_TABLE is empty, so there is no place for it; name one")
    if path.is_dir():
        raise ValueError(f"table: {path} is a directory, wanted a file")
    arguments.make_directory(path.parent, "table")
    return path


def run(
    problems: list[Problem],
    progress: Progress,
    settings: Settings,
    budget: float,
    path: Path,
    entries: list[dict[str, Any]],
    facts: dict[str, Any],
) -> list[dict[str, Any]]:
    """Every problem in turn, each with an equal share of the time that is left; the table is written after each.

    Returns the table's entries.
    """
    from moe_triton.benchmarking import tuning

    begin = time.monotonic()
    display = StepDisplay(len(problems), budget / max(1, len(problems)))
    with display as on_step:
        for number, problem in enumerate(problems):
            left = budget - (time.monotonic() - begin)
            share = max(0.0, left) / (len(problems) - number)
            on_step(problem.title(), 0.0)
            title = problem.title()
            on_try = lambda words, outcome, title=title: on_step(f"{title}: {words}: {outcome.status}", 0.5)  # noqa: E731
            try:
                state = tuning.search(problem, progress, settings, share, on_try)
                ratio = tuning.confirmed_ratio(problem, state, settings)
            except tuning.Crashed as reason:
                print(f"{problem.title()}: not tuned: {reason}")
                display.finish_cell()
                continue
            is_better = ratio < tuning.GAIN
            entry = tuning.entry_of(problem, state, ratio, facts) if is_better else None
            if entry is not None or state.is_done:
                entries = tuning.merge(entries, problem, entry)
                tuning.write_table(path, entries)
            print(summary(problem, state, ratio, is_better))
            display.finish_cell()
    print(f"table: {path} ({len(entries)} entries)")
    from moe_triton_kernels.configs import user_table_path

    if path != user_table_path():
        print(f"to use it: export MOE_TRITON_TABLE={path}")
    return entries


def summary(problem: Problem, state: Any, ratio: float, is_better: bool) -> str:
    from moe_triton.kernel_stages import in_words

    statuses = [outcome["status"] for outcome in state.tried.values()]
    bad = {status: statuses.count(status) for status in ("wrong", "failed") if status in statuses}
    counts = f"{len(statuses) - 1} tried" + "".join(f", {count} {status}" for status, count in bad.items())
    end = "" if state.is_done else "; the time was over before all neighbours were tried"
    end += f"; {problem.left_out}" if problem.left_out else ""
    if not is_better:
        return f"{problem.title()}: nothing faster than {in_words(state.incumbent)} ({counts}{end})"
    better = f"{in_words(state.best)}, {1 / ratio:.2f}x as fast as {in_words(state.incumbent)}"
    return f"{problem.title()}: {better} ({counts}{end})"


def dry(problems: list[Problem], budget: float) -> list[dict[str, str]]:
    """The configuration that runs today and its neighbours, compiled for an architecture that may not be here."""
    every: list[dict[str, str]] = []
    from moe_triton.benchmarking import tuning
    from moe_triton.kernel_stages import chosen_config, in_words
    from moe_triton_kernels.tools.search import neighbours

    console = plain_console()
    begin = time.monotonic()
    for problem in problems:
        case = problem.case
        running = chosen_config(
            problem.name, case.hidden, case.intermediate, case.torch_dtype, problem.bucket, problem.architecture,
            case.format,
        )  # fmt: skip
        near = neighbours(running, problem.name, case.hidden, case.intermediate)
        configs = list(dict.fromkeys([running, *tuning.first_candidates(problem, running), *near]))
        without = f", {problem.left_out}" if problem.left_out else ""
        count = f"today's configuration and {len(configs) - 1} candidates"
        print(f"{problem.title()}, {problem.architecture}: {count}{without}")
        rows: list[list[str]] = []

        def on_report(config: dict[str, Any], found: dict[str, Any], rows: list[list[str]] = rows) -> None:
            report = found["report"] or {}
            verdict = found["error"] or ", ".join(found["broken"]) or "ok"
            cells = [str(report.get(name, "")) for name in ("registers", "spills", "shared_bytes")]
            rows.append([in_words(config), *cells, verdict])

        print(f"compiling {problem.title()}", file=sys.stderr, flush=True)
        if time.monotonic() - begin < budget:
            tuning.offline_gates(problem, [asdict(config) for config in configs], on_report)
        else:
            rows = [[in_words(config), "", "", "", "not compiled: the budget is spent"] for config in configs]
        columns = ("configuration", "registers", "spills", "shared bytes", "offline gates")
        print_table(console, columns, rows, text=(columns[0], columns[-1]), less=("shared bytes", "spills"))
        print()
        every += [{"problem": problem.title(), **dict(zip(columns, row, strict=True))} for row in rows]
    return every
