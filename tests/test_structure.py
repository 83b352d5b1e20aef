"""The shape of the house: imports point downwards only, and importing costs nothing that is not there."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src" / "moe_triton"

# A module may import from its own level and from those above it in this list, which runs from the ground up.
LEVELS = [
    ["checks", "files", "kinds", "quantization", "records", "simulate", "torch_internals"],
    ["reference"],
    ["backends"],
    ["runtime"],
    ["autograd"],
    ["routing", "dispatch", "losses"],
    ["experts"],
    ["distributed"],
    ["layers"],
    ["kernel_stages"],
    ["explain", "integrations", "metrics", "replay", "training"],
    ["benchmarking", "compat"],
    ["quantize", "swap"],
    ["cli"],
]
KNOW_THE_KERNELS = (
    ("backends", "triton"),
    ("benchmarking", "cases.py"),
    ("benchmarking", "environment.py"),
    ("benchmarking", "stages.py"),
    ("benchmarking", "stages_triton.py"),
    ("benchmarking", "stages_fp8.py"),
    ("benchmarking", "kernel_search.py"),
    ("benchmarking", "tune_worker.py"),
    ("benchmarking", "tuning.py"),
    ("cli", "info.py"),
    ("cli", "inspect.py"),
    ("cli", "tune.py"),
    ("explain.py",),
    ("kernel_stages.py",),
    ("runtime.py",),
    ("simulate", "presets.py"),
    ("simulate", "published.py"),
)
LEVEL = {name: depth for depth, names in enumerate(LEVELS) for name in names}
NAMES = {path.stem if path.is_file() else path.name for path in SRC.iterdir()} - {"__pycache__", "py"}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms(names: set[str]) -> set[str]:
    parts = [name.split(".") for name in names if name.split(".")[0] == "moe_triton"]
    return {part[1] for part in parts if len(part) > 1 and part[1] in NAMES}


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda p: str(p.relative_to(SRC)))
def test_imports_point_downwards(path):
    room = path.relative_to(SRC).parts[0].removesuffix(".py")
    if room in ("__init__", "__main__"):
        return
    assert room in LEVEL, f"{room} has no level yet"
    for other in rooms(imports(path)):
        assert LEVEL[other] <= LEVEL[room], f"{room} imports {other}, which stands above it"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: p.name)
def test_kernels_import_torch_and_triton_only(path):
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "moe_triton_kernels"}
    assert {name.split(".")[0] for name in imports(path)} <= allowed


def test_only_the_triton_backend_and_the_tools_know_the_kernels():
    for path in SRC.rglob("*.py"):
        if any(name.startswith("moe_triton_kernels") for name in imports(path)):
            assert path.relative_to(SRC).parts[:2] in KNOW_THE_KERNELS, path


OPTIONAL = ["triton", "transformers", "deepspeed", "matplotlib", "numba"]
HIDE_ONE = """
import importlib.abc, importlib.util, os, sys, torch
assert not set(sys.argv) & set(sys.modules)
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(name)
real = importlib.util.find_spec
for missing in sys.argv[1:]:
    if os.fork() == 0:
        sys.meta_path.insert(0, Hide())
        importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] == missing else real(name, *a)
        import moe_triton
        layer = moe_triton.MoE(8, 4, 4)
        layer(torch.randn(3, 8)).output.sum().backward()
        assert missing not in sys.modules
        sys.exit()
    _, status = os.wait()
    print(missing, status, flush=True)
"""


@pytest.fixture(scope="module")
def outcomes_without() -> tuple[dict[str, str], str]:
    """The status of a process without each optional package, and what all of them said: forks of one that has torch."""
    command = [sys.executable, "-c", HIDE_ONE, *OPTIONAL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return dict(line.split() for line in done.stdout.splitlines()), done.stderr


@pytest.mark.parametrize("missing", OPTIONAL)
def test_imports_and_runs_without(missing, outcomes_without):
    """A finder that hides one package stands for a machine that does not have it."""
    statuses, said = outcomes_without
    assert statuses.get(missing) == "0", said


def test_importing_is_light():
    packages = {"triton", "transformers", "deepspeed", "matplotlib", "numba", "rich", "typer"}
    heavy = packages | {"torch.distributed.checkpoint"}
    program = f"import sys, moe_triton; print(sorted(set(sys.modules) & {heavy!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_the_scripts_of_benchmarks_find_what_they_import(path, monkeypatch):
    monkeypatch.syspath_prepend(str(path.parent))
    importlib.import_module(path.stem)
