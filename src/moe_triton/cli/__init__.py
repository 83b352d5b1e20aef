"""The command line: one file per command."""

from __future__ import annotations

import typer

from moe_triton.cli.bench import bench
from moe_triton.cli.info import info
from moe_triton.cli.inspect import inspect
from moe_triton.cli.profile import profile
from moe_triton.cli.simulate import simulate
from moe_triton.cli.train import train
from moe_triton.cli.tune import tune

app = typer.Typer(
    name="moe-triton",
    help="A mixture-of-experts runtime for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(info)
app.command()(bench)
app.command()(profile)
app.command()(inspect)
app.command()(tune)
app.command()(train)
app.command()(simulate)


@app.callback()
def root() -> None:
    """A mixture-of-experts runtime for PyTorch."""


def main() -> None:
    app()
