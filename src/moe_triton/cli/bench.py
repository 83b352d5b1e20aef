"""`moe-triton bench`: our layer beside its peers and the limits of this machine, in one interleaved run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from moe_triton import runtime
from moe_triton.benchmarking import chart, comparing, limits, page, report, runner
from moe_triton.benchmarking.cases import MODES, PRESETS, Case, make_workload
from moe_triton.benchmarking.comparing import Comparison
from moe_triton.benchmarking.environment import environment, source_digest
from moe_triton.benchmarking.providers import PROVIDERS, default_names
from moe_triton.benchmarking.results import read_results
from moe_triton.benchmarking.session import STAGES, Session
from moe_triton.benchmarking.stage_report import print_stages
from moe_triton.benchmarking.stages import measure_stages
from moe_triton.benchmarking.timing import CACHES, make_timer
from moe_triton.benchmarking.ways import WAYS
from moe_triton.cli import arguments
from moe_triton.cli.arguments import EXIT_FAULT, EXIT_INTERRUPTED, EXIT_SLOWER, EXIT_USAGE, fail, pick_several
from moe_triton.cli.display import StepDisplay, duration

CELL_S = 1.6  # about how long a cell takes, in budgets: checks, and slow peers that need more


def bench(
    ctx: typer.Context,
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite", "--preset", help="A named set of shapes (see --list). Default: cpu; sonic-12 on a GPU."
        ),
    ] = None,
    tokens: arguments.Tokens = None,
    hidden: arguments.Hidden = None,
    intermediate: arguments.Intermediate = None,
    experts: arguments.NumExperts = None,
    top_k: arguments.TopK = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16, or several with commas. Default: the suite's.")
    ] = None,
    skew: arguments.Skew = None,
    activation: arguments.Activation = None,
    bias: arguments.Bias = False,
    format: arguments.Format = None,
    fp8: arguments.Fp8 = False,
    mode: Annotated[
        str | None,
        typer.Option(help="forward (inference), backward, full (forward+backward); several with commas. Default: all."),
    ] = None,
    how: Annotated[str, typer.Option(help="eager, compile (torch.compile), graph (CUDA graph); or several.")] = "eager",
    providers: Annotated[
        str | None, typer.Option(help="Names with commas (see --list), ours first. Default: all that suit.")
    ] = None,
    stages: Annotated[
        bool, typer.Option("--stages", help="Time every stage of our layer too, beside its floor.")
    ] = False,
    device: arguments.DeviceName = "auto",
    budget: Annotated[float, typer.Option(help="Seconds of timing per shape, dtype and mode.")] = 10.0,
    cache: Annotated[
        str | None, typer.Option(help="cold (flushed before each call) or warm. Default: cold on a GPU, warm on a CPU.")
    ] = None,
    threads: arguments.Threads = None,
    seed: arguments.Seed = 0,
    report_dir: Annotated[
        Path | None, typer.Option("--report", help="A folder: report.html, results.json, results.csv, charts.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything, raw times included; - prints it, and no tables.")
    ] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write a line per cell and provider.")] = None,
    chart_file: Annotated[Path | None, typer.Option("--chart", help="Write a PNG chart.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write a Markdown table.")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure again what --json or --report holds already.")
    ] = False,
    compare_file: Annotated[
        Path | None, typer.Option("--compare", help="An older result: list what became slower, and exit with 4.")
    ] = None,
    fail_over: Annotated[str, typer.Option(help="With --compare: how much slower is slower.")] = "5%",
    show_list: Annotated[bool, typer.Option("--list", help="List suites and providers, and stop.")] = False,
) -> None:
    """Measure our layer beside its peers and the limits of this machine.

    Every provider is a whole MoE block over the same weights, and is checked against a float64 reference first. With
    --report or --json an interrupted run goes on where it was when the same command is given again. With --compare our
    times count, relative to the dense product of the same run; where the machine was not steady nothing is concluded.
    Exit code: 0; 1 when a result is wrong or a provider breaks; 2 for bad arguments; 3 when a GPU is needed; 4 when
    --compare finds us slower.
    """
    if show_list:
        print_list()
        return
    shape = dict(zip(arguments.SHAPE, (tokens, hidden, intermediate, experts, top_k), strict=True))
    overrides = {"skew": skew, "activation": activation, "bias": bias or None, "fp8": fp8 or None}
    prints_json = json_file == Path("-")
    json_file = None if prints_json else json_file
    files = {"--json": json_file, "--csv": csv_file, "--chart": chart_file, "--markdown": markdown_file}
    if report_dir is not None and json_file is None:
        json_file = report_dir / "results.json"
    with arguments.checked("bench"):
        where = arguments.pick_device(device)
        chosen = arguments.pick_cases(suite, shape, dtype, {k: v for k, v in overrides.items() if v is not None}, where)
        if format is not None:
            if mode not in (None, "forward"):
                raise ValueError(f"format: got it with mode {mode!r}, wanted forward: peers train what we keep frozen")
            chosen, mode = arguments.with_formats(chosen, format), "forward"
        mode = mode or "all"
        if dtype is None and not any(shape.values()):
            chosen = without_slow_dtypes(chosen, where)
        modes = {"all": list(MODES), "both": ["forward", "full"]}.get(mode) or pick_several(mode, "mode", MODES)
        ways = pick_several(how, "how", WAYS)
        names = None if providers is None else pick_several(providers, "providers", tuple(PROVIDERS))
        share = arguments.pick_share(fail_over, "fail-over")
        if cache is not None:
            arguments.pick(cache, "cache", CACHES, cache)
        arguments.check_settings(budget, threads, seed, list(files.items()))
        if report_dir is not None:
            arguments.make_directory(report_dir, "--report")
        if threads is not None:
            torch.set_num_threads(threads)
        facts = environment(where)
        settings = {"suite": suite, "modes": modes, "ways": ways, "budget_s": budget, "cache": cache, "seed": seed}
        settings["command"] = shlex.join(["moe-triton", *sys.argv[1:]])
        session = Session(path=json_file, facts=facts, settings=settings, source=source_digest())
        old = None if compare_file is None else read_results(compare_file, "--compare")
        if json_file is not None:
            arguments.lock(ctx, json_file, "--json")
        if not fresh:
            session.resume()

    show = (lambda _: None) if prints_json else show_tables
    try:
        measure_all(session, chosen, where, modes, ways, names, stages)
    except KeyboardInterrupt:
        show(session)
        done = f"{len(session.cells())} of {len(session.order)} cells are done"
        kept = "with --report DIR an interrupted run goes on where it was"
        if json_file is not None:
            kept = f"the same command goes on from {json_file}"
        fail("bench", f"interrupted: {done}; {kept}", EXIT_INTERRUPTED)
    except OSError as error:
        show(session)
        fail("bench", f"cannot write {json_file}: {error.strerror}; what was there before is intact", EXIT_FAULT)
    except torch.OutOfMemoryError as error:
        show(session)
        fail("bench", f"out of memory: {error}", EXIT_FAULT)
    show(session)
    comparison = None
    if old is not None:
        comparison = comparing.compare(old.runs, session.runs, share)
        print("\n".join(report.comparison_lines(comparison)), file=sys.stderr if prints_json else sys.stdout)
    if prints_json:
        print(report.json_text(session.document()))
    try:
        session.write()
        write(session, csv_file, chart_file, markdown_file)
        if report_dir is not None:
            write_report(report_dir, session, comparison)
    except OSError as error:
        fail("bench", f"cannot write {error.filename}: {error.strerror}; what was there before is intact", EXIT_FAULT)
    faults = list(dict.fromkeys(f"{row.label}: {row.status}: {row.note}" for run in session.runs for row in run.faults))
    if faults:
        fail("bench", "; ".join(faults), EXIT_FAULT)
    if comparison is not None and comparison.compared == 0:
        fail("bench", "--compare: the old file holds no time of any cell that was measured now", EXIT_USAGE)
    if comparison is not None and comparison.slower:
        raise typer.Exit(EXIT_SLOWER)


def without_slow_dtypes(cases: list[Case], device: torch.device) -> list[Case]:
    """A suite's cases, without bfloat16 on a CPU that has no product in it: they take an hour and tell nothing."""

    if device.type != "cpu" or torch.bfloat16 in limits.onednn_dtypes():
        return cases
    kept = [case for case in cases if case.torch_dtype != torch.bfloat16]
    if len(kept) < len(cases):
        reason = "this processor has no fast product in it (--dtype bfloat16 measures it all the same)"
        print(f"bfloat16 is left out: {reason}", file=sys.stderr)
    return kept


def print_list() -> None:
    for name, entry in PRESETS.items():
        print(f"suite     {name:14} {entry.about}{' (needs a GPU)' if entry.needs_gpu else ''}")
    for name, provider in PROVIDERS.items():
        print(f"provider  {name:14} {provider.label}{f': {provider.notes}' if provider.notes else ''}")


def measure_all(
    session: Session,
    cases: Sequence[Case],
    device: torch.device,
    modes: Sequence[str],
    ways: Sequence[str],
    names: Sequence[str] | None,
    with_stages: bool,
) -> None:
    """Measures every cell that the session does not hold yet, and adds it."""

    kinds = [*modes, *([STAGES] if with_stages else [])]
    wanted = {case: default_names(case, device) if names is None else list(names) for case in cases}
    keys = {(case, kind): session.key(case, kind, wanted[case]) for case in cases for kind in kinds}
    there = sum(key in session.found for key in keys.values())
    if there:
        print(
            f"{there} of {len(keys)} cells were measured before and are taken from {session.path}; "
            "--fresh measures them again",
            file=sys.stderr,
        )
    budget, seed, cache = (session.settings[name] for name in ("budget_s", "seed", "cache"))
    print(opening(cases, kinds, len(keys) - there, budget, session.facts), file=sys.stderr)
    display = StepDisplay(len(keys) - there, CELL_S * budget)
    with display as on_step:
        for case in cases:
            missing = [kind for kind in kinds if keys[case, kind] not in session.found]
            if rest := [mode for mode in modes if mode in missing]:
                runs = runner.measure_case(
                    case, device=device, modes=rest, names=wanted[case], ways=ways, budget_s=budget, seed=seed,
                    timer=make_timer(device, cache), on_step=on_step,
                )  # fmt: skip
                for run in runs:
                    session.add(keys[case, run.mode], run)
                    display.finish_cell()
            if STAGES in missing:
                what = f"{case.title()}, stages"
                timer, workload = make_timer(device, cache, ahead=True), make_workload(case, device, seed)
                found = measure_stages(workload, timer=timer, budget_s=budget, on_round=partial(on_step, what))
                session.add(keys[case, STAGES], found)
                display.finish_cell()


def opening(cases: Sequence[Case], kinds: Sequence[str], cells: int, budget: float, facts: dict[str, Any]) -> str:
    """What is going to happen, and about how long it takes."""
    shapes, device = len(cases), facts["device"]["name"]
    what = f"{shapes} shape{'s' * (shapes != 1)} x {', '.join(kinds)}, {cells} cell{'s' * (cells != 1)} on {device}"
    return f"bench: {what}: about {duration(cells * CELL_S * budget)} (--budget {budget:g}); Ctrl-C shows what is done"


def show_tables(session: Session) -> None:
    """The tables of the finished cells."""
    report.print_runs(session.runs)
    print_stages(session.stages)
    print(report.self_check_line(session.runs))
    print(report.caption(session.facts))


def write(session: Session, csv_file: Path | None, chart_file: Path | None, markdown_file: Path | None) -> None:
    """What the runs are written as beside the session's own JSON; None is not written."""

    if csv_file is not None:
        report.write_text(csv_file, report.csv_table(session.runs))
    if markdown_file is not None:
        report.write_text(markdown_file, report.markdown(session.runs, session.facts))
    if chart_file is not None:
        chart.draw(chart_file, session.runs, session.facts)


def write_report(folder: Path, session: Session, comparison: Comparison | None) -> None:
    """report.html, results.csv and a chart per mode; results.json is there already."""
    runs, facts = session.runs, session.facts
    report.write_text(folder / "results.csv", report.csv_table(runs))
    has_matplotlib = runtime.installed_version("matplotlib") is not None
    for mode in dict.fromkeys(run.mode for run in runs) if has_matplotlib else ():
        chart.draw(folder / f"chart-{mode}.png", [run for run in runs if run.mode == mode], facts)
    command = session.settings["command"]
    html = page.render(runs, facts, command, stages=session.stages, comparison=comparison)
    report.write_text(folder / "report.html", html)
    without = "" if has_matplotlib else " (no PNG charts, which need matplotlib: moe-triton[plot])"
    print(f"report: {folder / 'report.html'}{without}")
