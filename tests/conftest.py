"""Shared set-up: markers, and fresh memory poisoned with NaN, so that nothing can lean on memory that nobody wrote."""

from __future__ import annotations

import ast
import gc
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

if not os.environ.get("MOE_TRITON_TEST_ON_GPU"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is first imported

import pytest
import torch

from tests.helpers.poison import poisoned
from tests.helpers.ranks import four_ranks, two_ranks

__all__ = ["four_ranks", "two_ranks"]

TESTS = Path(__file__).parent
PEERS = re.compile(r"(deepspeed|peft|transformers|moe_triton\.compat\.deepspeed)(\.|$)")  # the last imports the first
# files that start programs of their own or compile: a test of them takes seconds
SLOW_FILES = ("test_compile", "test_documents", "test_gated_rows", "test_grouped", "test_loops", "test_structure")
SLOW_FILES += ("test_offline", "test_torch_internals")
SLOW_FOLDERS = ("benchmarking", "benchmarks", "checkpoint", "cli", "training")
OWN_PROCESSES = {"tests.helpers.faults", "tests.helpers.ranks.fork_context", "tests.helpers.ranks.started"}

if importlib.util.find_spec("triton"):
    from tests.helpers.interpreter import compute_in_bf16, convert_fp8, spare_time

    compute_in_bf16()
    convert_fp8()
    spare_time()
gc.disable()  # until all tests are collected: what is imported stays
torch.set_num_threads(1 if os.environ.get("PYTEST_XDIST_WORKER") else 2)


@cache
def imports(path: Path) -> frozenset[str]:
    """What a test file and the helpers that it imports import at their top: modules, and names of modules."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    helpers = [TESTS.parent.joinpath(*name.split(".")).with_suffix(".py") for name in found if "tests.helpers" in name]
    return frozenset(found.union(*(imports(helper) for helper in helpers if helper.is_file())))


@cache
def imports_a_peer(path: Path) -> bool:
    return any(PEERS.match(name) for name in imports(path))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m "not peer ..."` does not import the peers, which takes longer than many tests."""
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if is_test and "not peer" in config.option.markexpr and imports_a_peer(collection_path) else None


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile what every layer runs on a CPU, once, before processes that others wait for would do so."""
    if hasattr(session.config, "workerinput"):
        return
    from tests.helpers.layers import DTYPES, run_layers

    command = [sys.executable, "-m", "tests.helpers.layers", DTYPES[1]]
    with subprocess.Popen(command, cwd=TESTS.parent) as other:  # numba compiles one function at a time in a process
        run_layers(DTYPES[:1])
    if other.returncode:
        raise pytest.UsageError(f"{command} ended with {other.returncode}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All marks follow from names of files and folders, from fixtures and from imports.

    The long tests come first: one that starts last would run on one core while the other has nothing to do.
    """
    for item in items:
        folders = item.path.relative_to(TESTS).parts
        if item.path.stem in SLOW_FILES or set(folders) & set(SLOW_FOLDERS):
            item.add_marker("slow")
        choices = item.callspec.params if hasattr(item, "callspec") else {}
        if "kernels" in folders or "triton" in folders or choices.get("backend") == "triton":
            item.add_marker("interpreter")
        has_ranks = {"four_ranks", "two_ranks"} & set(item.fixturenames) or OWN_PROCESSES & imports(item.path)
        if has_ranks or "ranks" in item.path.stem:
            item.add_marker("ranks")
        if imports_a_peer(item.path):
            item.add_marker("peer")
    items.sort(key=lambda item: not {"ranks", "slow"} & {mark.name for mark in item.iter_markers()})


def pytest_collection_finish() -> None:
    """Let the collector of garbage look only at what the tests themselves make: the millions of objects before stay."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def wide_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables have all of their columns, whatever the terminal; tests of narrow ones ask for their width."""
    monkeypatch.setenv("COLUMNS", "240")


@pytest.fixture(autouse=True)
def poisoned_empty() -> Iterator[None]:
    with poisoned():
        yield


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    """One that a test makes in this very process, as DeepSpeed's layer needs, must not be there for the next test."""
    yield
    if not torch.distributed.is_initialized():
        return
    torch.distributed.destroy_process_group()
    if comm := sys.modules.get("deepspeed.comm.comm"):
        comm.cdb = None
    if groups := sys.modules.get("deepspeed.utils.groups"):
        for name, value in vars(groups).items():
            if name.startswith("_") and name.isupper() and isinstance(value, dict):
                value.clear()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
