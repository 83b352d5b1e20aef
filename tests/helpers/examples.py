"""Run a program of examples/ inside a test, in one process or in each rank, as on the command line."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

EXAMPLES = Path(__file__).parents[2] / "examples"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Many small operations wait for each other on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_example(name: str, *arguments: str) -> str:
    """What it prints. The process group, where there is one already, is neither made nor destroyed."""
    path = EXAMPLES / name
    printed = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(sys, "argv", [str(path), *arguments]))
        stack.enter_context(patch.object(sys, "path", [str(EXAMPLES), *sys.path]))
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(one_thread())
        if dist.is_initialized():
            stack.enter_context(patch.object(dist, "init_process_group"))
            stack.enter_context(patch.object(dist, "destroy_process_group"))
        runpy.run_path(str(path), run_name="__main__")
    return printed.getvalue()
