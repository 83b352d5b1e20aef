"""`moe-triton bench`: our layer beside its peers and the limits of this machine, in one interleaved run."""

from __future__ import annotations

import datetime
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import torch
import typer

from moe_triton.cli.info import devices, version

if TYPE_CHECKING:
    from moe_triton.benchmarking.cases import Case
    from moe_triton.benchmarking.runner import Run

EXIT_FAULT = 1  # a provider gave a wrong result, or broke
EXIT_USAGE = 2
EXIT_NO_GPU = 3
SHAPE = ("tokens", "hidden", "intermediate", "experts", "top_k")
VERSIONS = ("moe-triton", "torch", "triton", "transformers", "deepspeed")


class Unmeasurable(Exception):
    """What was asked for needs another machine."""


def bench(
    preset: Annotated[
        str | None, typer.Option(help="A named set of shapes (see --list). Default: cpu, or sonic-12 on a GPU.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="T: tokens. With the next four: one shape instead.")] = None,
    hidden: Annotated[int | None, typer.Option(help="d: hidden size.")] = None,
    intermediate: Annotated[int | None, typer.Option(help="n: intermediate size of an expert.")] = None,
    experts: Annotated[int | None, typer.Option(help="E: experts.")] = None,
    top_k: Annotated[int | None, typer.Option(help="K: experts per token.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16, or several with commas. Default: the preset's.")
    ] = None,
    skew: Annotated[
        str | None, typer.Option(help="How tokens spread over the experts: uniform, zipf, hot or empty.")
    ] = None,
    activation: Annotated[str | None, typer.Option(help="The experts' activation. Default: swiglu.")] = None,
    bias: Annotated[bool, typer.Option("--bias", help="Give the experts biases.")] = False,
    mode: Annotated[str, typer.Option(help="forward (inference), full (forward+backward) or both.")] = "both",
    providers: Annotated[
        str | None, typer.Option(help="Names with commas (see --list), ours first. Default: all that suit.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    budget: Annotated[float, typer.Option(help="Seconds of timing per shape, dtype and mode.")] = 10.0,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: torch's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random tensors.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything, raw times included.")] = None,
    chart_file: Annotated[Path | None, typer.Option("--chart", help="Write a PNG chart.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write a Markdown table.")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List presets and providers, and stop.")] = False,
) -> None:
    """Measure our layer beside transformers, DeepSpeed and the limits of this machine.

    Every provider is a whole MoE block over the same weights, and is checked against a float64 reference first.
    Exit code: 0; 1 when a result is wrong or a provider breaks; 2 for bad arguments; 3 when a GPU is needed.
    """
    from moe_triton.benchmarking import cases, report
    from moe_triton.benchmarking.providers import PROVIDERS

    if show_list:
        for name, entry in cases.PRESETS.items():
            print(f"preset    {name:14} {entry.about}{' (needs a GPU)' if entry.needs_gpu else ''}")
        for name, provider in PROVIDERS.items():
            print(f"provider  {name:14} {provider.label}{f': {provider.notes}' if provider.notes else ''}")
        return
    shape = dict(zip(SHAPE, (tokens, hidden, intermediate, experts, top_k), strict=True))
    overrides = {"skew": skew, "activation": activation, "bias": bias or None}
    outputs = (("--json", json_file), ("--chart", chart_file), ("--markdown", markdown_file))
    try:
        where = pick_device(device)
        chosen = pick_cases(preset, shape, dtype, {k: v for k, v in overrides.items() if v is not None}, where)
        modes = pick(mode, "mode", {"forward": ("forward",), "full": ("full",), "both": cases.MODES})
        names = None if providers is None else [pick(name, "providers", PROVIDERS, name) for name in split(providers)]
        check_settings(budget, threads, seed, outputs)
    except (ValueError, TypeError) as error:
        fail(str(error), EXIT_USAGE)
    except Unmeasurable as reason:
        fail(f"not measured on this machine: {reason}", EXIT_NO_GPU)
    if threads is not None:
        torch.set_num_threads(threads)
    settings = {"preset": preset, "modes": list(modes), "budget_s": budget, "seed": seed}
    facts = environment(where)
    runs: list[Run] = []
    with StepDisplay() as on_step:
        for case in chosen:
            try:
                runs += measure(case, where, modes, names, budget, seed, on_step)
            except torch.OutOfMemoryError as error:
                fail(f"out of memory at {case.title()}: {error}", EXIT_FAULT)
            if json_file is not None:  # after every case: an interrupted run keeps what it has
                report.write_json(json_file, report.document(runs, facts, settings))
    report.print_runs(runs)
    print(report.caption(facts))
    if markdown_file is not None:
        report.write_text(markdown_file, report.markdown(runs, facts))
    if chart_file is not None:
        from moe_triton.benchmarking.chart import draw

        draw(chart_file, runs, facts)
    faults = list(dict.fromkeys(f"{row.label}: {row.status}: {row.note}" for run in runs for row in run.faults))
    if faults:
        fail("; ".join(faults), EXIT_FAULT)


def measure(
    case: Case,
    device: torch.device,
    modes: Sequence[str],
    names: Sequence[str] | None,
    budget: float,
    seed: int,
    on_step: Any,
) -> list[Run]:
    from moe_triton.benchmarking.providers import default_names
    from moe_triton.benchmarking.runner import measure_case

    return measure_case(
        case,
        device=device,
        modes=modes,
        names=default_names(case, device) if names is None else names,
        budget_s=budget,
        seed=seed,
        on_step=on_step,
    )


# The arguments --------------------------------------------------------------------------------------------------------


def fail(message: str, code: int) -> NoReturn:
    typer.echo(f"moe-triton bench: {message}", err=True)
    raise typer.Exit(code)


def split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def pick(key: str, argument: str, table: Any, value: Any = None) -> Any:
    """table[key], or `value` when one is given; a ValueError that lists the keys when there is no such key."""
    if key not in table:
        raise ValueError(f"{argument}: got {key!r}, wanted one of {', '.join(table)}")
    return table[key] if value is None else value


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: got {name!r}, wanted auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {name!r}, wanted auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Unmeasurable(f"needs a GPU: {name} is not there")
    return device


def pick_cases(
    preset: str | None,
    shape: dict[str, int | None],
    dtype: str | None,
    overrides: dict[str, Any],
    device: torch.device,
) -> list[Case]:
    """The cases that the options ask for, in the preset's order, each once."""
    from moe_triton.benchmarking.cases import DTYPES, PRESETS, Case

    dtypes = None if dtype is None else [pick(name, "dtype", DTYPES, name) for name in split(dtype)]
    if dtypes == []:
        raise ValueError(f"dtype: got {dtype!r}, wanted one of {', '.join(DTYPES)}")
    given: dict[str, Any] = {name: value for name, value in shape.items() if value is not None}
    if given:
        if preset is not None:
            raise ValueError(f"preset: got {preset!r} together with {', '.join(given)}, wanted one or the other")
        missing = [name for name in shape if name not in given]
        if missing:
            raise ValueError(f"{', '.join(missing)}: missing; one shape needs all of {', '.join(shape)}")
        bases: Sequence[Case] = [Case(**given)]
    else:
        name = preset or ("sonic-12" if device.type == "cuda" else "cpu")
        found = pick(name, "preset", PRESETS)
        if found.needs_gpu and device.type != "cuda":
            raise Unmeasurable(f"preset {name} needs a GPU")
        bases = found.cases
    cases = [replace(base, dtype=name, **overrides) for base in bases for name in dtypes or [base.dtype]]
    return list(dict.fromkeys(cases))


def check_settings(budget: float, threads: int | None, seed: int, outputs: Sequence[tuple[str, Path | None]]) -> None:
    """Fails before anything is measured, not after."""
    if not 0 <= budget < float("inf"):
        raise ValueError(f"budget: got {budget}, wanted seconds >= 0")
    if threads is not None and threads < 1:
        raise ValueError(f"threads: got {threads}, wanted at least 1")
    if seed < 0:
        raise ValueError(f"seed: got {seed}, wanted at least 0")
    check_outputs(outputs)


def check_outputs(outputs: Sequence[tuple[str, Path | None]]) -> None:
    for option, path in outputs:
        if path is not None and path.is_dir():
            raise ValueError(f"{option}: {path} is a directory, wanted a file")
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{option}: no directory {path.parent}")


# The surroundings -----------------------------------------------------------------------------------------------------


def environment(device: torch.device) -> dict[str, Any]:
    """Where and when a result was measured."""
    name = "cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": next(found for found in devices() if found["device"] == name),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}},
        "commit": commit(),
    }


def commit() -> dict[str, Any] | None:
    """The commit of this very source file, and whether anything differs from it; None outside a repository."""
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
        return None
    found, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return None if found is None else {"hash": found, "dirty": bool(changes)}


class StepDisplay:
    """What is going on, on stderr: a bar in a terminal, else a line whenever something new begins."""

    def __enter__(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(file=sys.stderr)
        self.last = ""
        self.bar = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self.bar = Progress(*columns, console=console, transient=True)
            self.bar.start()
            self.task = self.bar.add_task("starting", total=1.0)
        return self.step

    def step(self, what: str, share: float) -> None:
        if self.bar is not None:
            self.bar.update(self.task, description=what, completed=share)
        elif what != self.last:
            print(what, file=sys.stderr, flush=True)
        self.last = what

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
