"""What the commands share: how arguments are read, and how a command ends."""

from __future__ import annotations

import contextlib
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import torch
import typer

from moe_triton import runtime
from moe_triton.benchmarking import report
from moe_triton.benchmarking.cases import DTYPES, PRESETS, Case
from moe_triton.checks import check_threads
from moe_triton.files import Locked, locked
from moe_triton.quantization.formats import FORMATS

EXIT_FAULT = 1  # a provider gave a wrong result, or broke
EXIT_USAGE = 2
EXIT_NO_GPU = 3
EXIT_SLOWER = 4
EXIT_INTERRUPTED = 130
SHAPE = ("tokens", "hidden", "intermediate", "experts", "top_k")
T = TypeVar("T")

# Options that several commands have.
Tokens = Annotated[int | None, typer.Option(help="T: tokens. With the next four: one shape instead.")]
Hidden = Annotated[int | None, typer.Option(help="d: hidden size.")]
Intermediate = Annotated[int | None, typer.Option(help="n: intermediate size of an expert.")]
NumExperts = Annotated[int | None, typer.Option(help="E: experts.")]
TopK = Annotated[int | None, typer.Option(help="K: experts per token.")]
Skew = Annotated[
    str | None, typer.Option(help="How tokens spread over the experts: uniform, zipf, hot or quarter-empty.")
]
Activation = Annotated[str | None, typer.Option(help="The experts' activation. Default: the layer's own, or swiglu.")]
Format = Annotated[
    str | None, typer.Option(help=f"Our projections as codes: {', '.join(FORMATS)}. Default: in the dtype.")
]
Fp8 = Annotated[bool, typer.Option("--fp8", help="Our experts' products in fp8; emulated where a device has none.")]
Bias = Annotated[bool, typer.Option("--bias", help="Give the experts biases.")]
DeviceName = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads. Default: torch's.")]
Seed = Annotated[int, typer.Option(help="Of the random tensors.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value instead; words go to stderr.")]


class Unmeasurable(Exception):
    """What was asked for needs another machine."""


def fail(command: str, message: str, code: int) -> NoReturn:
    """Ends a command with one line on stderr and an exit code."""
    typer.echo(f"moe-triton {command}: {message}", err=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def json_instead(wanted: bool) -> Iterator[Callable[[Any], None]]:
    """Gives a function that takes a command's result: printed as JSON where `wanted`, all other output on stderr."""
    found: list[Any] = []
    with contextlib.redirect_stdout(sys.stderr if wanted else sys.stdout):
        yield found.append
    if wanted and found:
        print(report.json_text(found[-1]))


@contextlib.contextmanager
def checked(command: str, writes: Path | None = None) -> Iterator[None]:
    """Ends the command where an argument is wrong, needs another machine, or the directory cannot be written to."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        fail(command, str(error), EXIT_USAGE)
    except Unmeasurable as reason:
        fail(command, f"not measured on this machine: {reason}", EXIT_NO_GPU)
    except OSError as error:
        if writes is None:
            raise
        fail(command, f"cannot write to {writes}: {error.strerror}", EXIT_FAULT)


def check_backend(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """ValueError for an unknown backend or a broken table, Unmeasurable where the backend cannot run."""
    try:
        runtime.check_usable(backend, device, dtype)
    except RuntimeError as error:
        raise Unmeasurable(str(error)) from error


def split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def pick(key: str, argument: str, table: Any, value: Any = None) -> Any:
    """table[key], or `value` when one is given; a ValueError that lists the keys when there is no such key."""
    if key not in table:
        raise ValueError(f"{argument}: got {key!r}, wanted one of {', '.join(table)}")
    return table[key] if value is None else value


def pick_several(text: str, argument: str, table: Sequence[str]) -> list[str]:
    """The names in a comma-separated text, each one of the table's, each once."""
    found = [pick(name, argument, table, name) for name in dict.fromkeys(split(text))]
    if not found:
        raise ValueError(f"{argument}: got {text!r}, wanted one of {', '.join(table)}")
    return found


def pick_model(model: str, known: Mapping[str, T], argument: str = "model") -> T:
    """The entry whose name is `model`, or the only one whose name begins so; neither case nor punctuation matters."""
    names = {slug(name): name for name in known}
    found = [name for name in names if name.startswith(slug(model))]
    if slug(model) in names:
        found = [slug(model)]
    if len(found) != 1:
        raise ValueError(f"{argument}: got {model!r}, wanted one of {', '.join(found or names)}")
    return known[names[found[0]]]


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def pick_share(text: str, argument: str) -> float:
    """ "5%" or "5" -> 0.05."""
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{argument}: got {text!r}, wanted a percentage such as 5%")
    return value / 100


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {name!r}, wanted auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Unmeasurable(f"needs a GPU: {name} is not there")
    return device


def whole_shape(shape: dict[str, int | None], other: str, value: str | None) -> dict[str, Any]:
    """The sizes of one layer, {} where none is given; ValueError where one is missing, or the option `other` given."""
    given = {name: size for name, size in shape.items() if size is not None}
    if given and value is not None:
        raise ValueError(f"{other}: got {value!r} together with {', '.join(given)}, wanted one or the other")
    missing = [name for name in shape if name not in given]
    if given and missing:
        raise ValueError(f"{', '.join(missing)}: missing; one shape needs all of {', '.join(shape)}")
    return given


def pick_cases(
    suite: str | None, shape: dict[str, int | None], dtype: str | None, overrides: dict[str, Any], device: torch.device
) -> list[Case]:
    """The cases that the options ask for, in the suite's order, each once."""
    dtypes = None if dtype is None else pick_several(dtype, "dtype", tuple(DTYPES))
    given = whole_shape(shape, "suite", suite)
    if given:
        bases: Sequence[Case] = [Case(**given)]
    else:
        name = suite or ("sonic-12" if device.type == "cuda" else "cpu")
        found = pick(name, "suite", PRESETS)
        if found.needs_gpu and device.type != "cuda":
            raise Unmeasurable(f"suite {name} needs a GPU")
        bases = found.cases
    cases = [replace(base, dtype=name, **overrides) for base in bases for name in dtypes or [base.dtype]]
    return list(dict.fromkeys(cases))


def with_formats(cases: list[Case], formats: str | None) -> list[Case]:
    """The cases, each with every one of the formats that a text names; None: as they are."""
    if formats is None:
        return cases
    return [replace(case, format=name) for case in cases for name in pick_several(formats, "format", tuple(FORMATS))]


def check_settings(budget: float, threads: int | None, seed: int, outputs: Sequence[tuple[str, Path | None]]) -> None:
    """Fails before anything is measured, not after."""
    if not 0 <= budget < math.inf:
        raise ValueError(f"budget: got {budget}, wanted seconds >= 0")
    if threads is not None:
        check_threads("threads", threads)
    if seed < 0:
        raise ValueError(f"seed: got {seed}, wanted at least 0")
    check_outputs(outputs)


def check_outputs(outputs: Sequence[tuple[str, Path | None]]) -> None:
    for option, path in outputs:
        if path is None:
            continue
        if option == "--chart":
            runtime.check_matplotlib()
        if path.is_dir():
            raise ValueError(f"{option}: {path} is a directory, wanted a file")
        if not path.parent.is_dir():
            raise ValueError(f"{option}: no directory {path.parent}")
        check_writable(path.parent, option)


def lock(ctx: typer.Context, path: Path, option: str) -> None:
    """Keeps other processes from working on the same file until the command ends; ValueError where one does."""
    try:
        ctx.with_resource(locked(path.with_name(f".{path.name}.lock")))
    except Locked as holder:
        raise ValueError(f"{option}: {holder} is working on {path}; name another file") from None
    except OSError as error:
        raise ValueError(f"{option}: cannot write to {path.parent}: {error.strerror}") from error


def make_directory(path: Path, option: str) -> None:
    """The directory, made where it is missing; ValueError naming the option where it cannot be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option}: cannot write to {path}: {error.strerror}") from error
    check_writable(path, option)


def check_writable(folder: Path, option: str) -> None:
    """ValueError naming the option where no file can be made in the folder."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".moe-triton-"):
            pass
    except OSError as error:
        raise ValueError(f"{option}: cannot write to {folder}: {error.strerror}") from error
