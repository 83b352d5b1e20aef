"""Make docs/cli.md from the parser of `moe-triton`, and docs/api.md from the public names; `python
benchmarks/tables.py` writes them."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import typer

from moe_triton.cli import app

CLI_HEAD = """# Command line

Made by `python benchmarks/tables.py` from the parser of `moe-triton`; do not edit. `python -m moe_triton info` is the
same as `moe-triton info`. What the commands are for: [benchmarks.md](benchmarks.md), [profiling.md](profiling.md),
[kernels.md](kernels.md), [training.md](training.md), [simulate.md](simulate.md).

`moe-triton` alone shows where to begin, `--version` the version, and `--help` after a command its options. `--json`
makes every command print JSON and no words. `--install-completion` sets up completion in your shell.
"""

API_HEAD = """# API

Made by `python benchmarks/tables.py` from the public names; do not edit. What is not listed here is private. Shapes: T
tokens, d hidden size, n intermediate size of an expert, E experts, K choices per token, S = T*K assignments.
"""
# Public modules -> what they are for.
MODULES = {
    "moe_triton": "Layers, operations, and what works on whole models.",
    "moe_triton.distributed": "Expert parallelism, gradients and checkpoints.",
    "moe_triton.metrics": "Load of the experts, and where readings go.",
    "moe_triton.integrations.transformers": "The experts interface of transformers.",
    "moe_triton.integrations.trainer": "For transformers' Trainer.",
}


def row(option: Any) -> str:
    """A row of the table of options: names, default and help; a default that the help names already is left out."""
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    text = " ".join((option.help or "").split()).replace("|", "\\|")
    default = option.default
    written = "" if default is None or default is False or callable(default) or "default" in text.lower() else default
    if option.required:
        written = "required"
    return f"| {names} | {f'`{written}`' if written not in ('', 'required') else written} | {text} |"


def section(name: str, command: Any) -> str:
    paragraphs = [" ".join(part.split()) for part in inspect.cleandoc(command.help or "").split("\n\n")]
    options = [option for option in command.params if "--help" not in option.opts]
    table = ["| option | default | effect |", "|---|---|---|", *map(row, options)]
    return "\n".join([f"## moe-triton {name}", "", "\n\n".join(paragraphs), "", *table, ""])


def cli_page() -> str:
    """The whole page, the commands in the order of `moe-triton --help`."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return re.sub(r"\f|\\b", "", "\n".join([CLI_HEAD, *(section(name, command) for name, command in commands.items())]))


def public_names(module: str) -> list[str]:
    """The names of a public module: those of `__all__`, or else the documented functions and classes made in it."""
    found = importlib.import_module(module)
    names = getattr(found, "__all__", None) or [
        name
        for name, value in vars(found).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module and inspect.getdoc(value)
    ]
    return sorted(names, key=lambda name: (not name[0].isupper(), name.lower()))


def api_page() -> str:
    """The whole page: one directive of mkdocstrings for each public name, classes first; modules stay out."""
    parts = [API_HEAD]
    for module, purpose in MODULES.items():
        names = [
            name
            for name in public_names(module)
            if not inspect.ismodule(getattr(importlib.import_module(module), name))
        ]
        parts += [f"## {module}\n\n{purpose}\n", *(f"::: {module}.{name}\n" for name in names)]
    return "\n".join(parts)
