"""No kernel reads or writes past an end of a tensor: each runs beside protected memory, in a process of its own."""

from __future__ import annotations

import ast
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moe_triton_kernels

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on a CPU")
ROOT = Path(__file__).parents[2]


def guarded_run(*arguments: str) -> tuple[int, list[str], str]:
    """The exit code, the kernels in the order in which they were launched, and what the process said."""
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.helpers.guarded_kernels", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    return done.returncode, [words[1] for words in lines if words[:1] == ["kernel"]], done.stderr


def kernels_of_the_package() -> set[str]:
    """The names of our kernels, without those that the interpreter does not run: Gluon's, and `tl.dot_scaled`."""
    trees = [ast.parse(path.read_text()) for path in Path(moe_triton_kernels.__path__[0]).glob("*.py")]
    functions = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {function.name for function in functions if function.name.endswith("_kernel")} - {"mxfp8_rows_kernel"}


@pytest.mark.parametrize("side", ["end", "start"])
def test_every_kernel_stays_within_its_tensors(side: str) -> None:
    code, launched, said = guarded_run(side)
    assert code == 0, f"the last kernel was {launched[-1:]}\n{said}"
    assert set(launched) == kernels_of_the_package()


@pytest.mark.parametrize("side", ["end", "start"])
def test_a_planted_fault_ends_the_process_and_is_named(side: str) -> None:
    code, launched, said = guarded_run(side, "planted")
    assert code == -signal.SIGSEGV, said
    assert launched == ["planted_kernel"]
