"""`moe-triton` in processes of its own, which are forked from one that has imported everything already."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.helpers.ranks import fork_context, free_port


def start_commands(arguments: Sequence[object], printed: Path, processes: int = 1) -> list[Any]:
    """Start them, as torchrun does where there are several; what all print goes to a file, errors to one beside it."""
    place: dict[str, object] = {"COLUMNS": 240}
    if processes > 1:
        place |= {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    running = [
        fork_context().Process(target=_run, args=([*map(str, arguments)], rank, place, printed), daemon=True)
        for rank in range(processes)
    ]
    for process in running:
        process.start()
    return running


def run_command(arguments: Sequence[object], printed: Path, processes: int = 1) -> str:
    """Run one or several to their end, which has to be a good one, and return what they printed."""
    running = start_commands(arguments, printed, processes)
    try:
        for process in running:
            process.join(600)
            assert process.exitcode == 0, errors_beside(printed).read_text()
    finally:
        for process in running:
            process.kill()
    return printed.read_text()


def errors_beside(printed: Path) -> Path:
    return printed.with_name(f"{printed.name}, errors")


def _run(arguments: list[str], rank: int, place: dict[str, object], printed: Path) -> None:
    from moe_triton import cli

    if "WORLD_SIZE" in place:
        place |= {"RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in place.items()})
    for stream, path in ((1, printed), (2, errors_beside(printed))):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv = ["moe-triton", *arguments]
    cli.main()
