"""The command line: one file per command."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from moe_triton.cli.arguments import EXIT_FAULT
from moe_triton.cli.bench import bench
from moe_triton.cli.info import info
from moe_triton.cli.inspect import inspect
from moe_triton.cli.profile import profile
from moe_triton.cli.simulate import simulate
from moe_triton.cli.train import train
from moe_triton.cli.tune import tune
from moe_triton.runtime import installed_version

START = """\
moe-triton {version}: a mixture-of-experts runtime for PyTorch

  moe-triton bench               our layer beside its peers, on this machine
  moe-triton profile             where the time of a layer goes
  moe-triton train --out demo    trains a small language model, and writes a report

In Python: moe_triton.swap(model) lets a model's experts run on moe_triton.
More commands and all options: moe-triton --help"""

app = typer.Typer(
    name="moe-triton", help="A mixture-of-experts runtime for PyTorch.", invoke_without_command=True,
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich" if sys.stdout.isatty() else None,  # boxes in a terminal only
)  # fmt: skip
app.command()(info)
app.command()(bench)
app.command()(profile)
app.command()(inspect)
app.command()(tune)
app.command()(train)
app.command()(simulate)


def print_version(wanted: bool) -> None:
    if wanted:
        print(f"moe-triton {installed_version('moe-triton')}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version, and stop.")
    ] = False,
) -> None:
    """A mixture-of-experts runtime for PyTorch."""
    if ctx.invoked_subcommand is None:
        print(START.format(version=installed_version("moe-triton")))


def main() -> None:
    """Runs the command line. What the system refuses (memory, a full disk behind stdout) ends it with one line."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except (OSError, MemoryError, RuntimeError) as error:
        words = str(error).splitlines()[0] if str(error) else "out of memory"
        if type(error) is RuntimeError and "allocate memory" not in words:  # torch's, for a CPU's memory
            raise
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (what is left to print would fail again at exit)
        typer.echo(f"moe-triton: {words}", err=True)
        sys.exit(EXIT_FAULT)
