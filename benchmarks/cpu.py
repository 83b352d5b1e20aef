"""The CPU suite in one command: `python benchmarks/cpu.py` measures suite "cpu" and keeps the result.

Writes benchmarks/results/cpu/NAME.json (everything, raw times included), NAME.png (the chart) and NAME.md (a table for
the README). Run it on a machine that does nothing else; it takes a few minutes on two cores.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import torch
import typer

from moe_triton.backends.torch.processor import this_processor
from moe_triton.cli import app

RESULTS = Path(__file__).parent / "results" / "cpu"


def main(
    name: Annotated[str | None, typer.Option(help="Of the result files. Default: processor and threads.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the result files.")] = RESULTS,
    suite: Annotated[str, typer.Option(help="A CPU suite of `moe-triton bench`.")] = "cpu",
    budget: Annotated[float, typer.Option(help="Seconds of timing per shape, dtype and mode.")] = 15.0,
) -> None:
    """Measure the CPU suite and write JSON, chart and Markdown table."""
    if name is None:
        name = re.sub(r"[^a-z0-9]+", "-", f"{this_processor().name} {torch.get_num_threads()} threads".lower()).strip(
            "-"
        )
    out.mkdir(parents=True, exist_ok=True)
    files = {f"--{kind}": out / f"{name}.{ending}" for kind, ending in (("json", "json"), ("chart", "png"))}
    files["--markdown"] = out / f"{name}.md"
    arguments = ["bench", "--suite", suite, "--device", "cpu", "--budget", str(budget)]
    for option, path in files.items():
        arguments += [option, str(path)]
    app(arguments, prog_name="moe-triton")  # ends the process with the command's exit code


if __name__ == "__main__":
    typer.run(main)
