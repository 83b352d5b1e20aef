"""Make the parts of ARCHITECTURE.md that are taken from the code: the call chains, recorded while a layer runs, and the
table of sizes.

    python docs/architecture.py           # write them
    python docs/architecture.py --check   # exit with 1 where a call chain differs; the tests run this
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType

os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is first imported

import torch
import torch.distributed as dist

from moe_triton import MoE
from moe_triton.distributed import ExpertParallel, make_groups

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "ARCHITECTURE.md"
MARKED = re.compile(r"(<!-- ([^>]+?) \(docs/architecture\.py\) -->\n).*?(<!-- end -->)", re.DOTALL)
CODE = (str(ROOT / "src" / "moe_triton"), str(ROOT / "kernels"))
# The function that multiplies, by backend.
PRODUCT = {"torch": ("backends/torch/products.py", "products"), "triton": ("moe_triton_kernels/up.py", "Up.__call__")}
WRAPPERS = ("torch_internals.py",)  # decorators, which decide nothing about the call
# Folder -> its lines of Python at commit 5fc9d34, and where they are now.
SIZES: dict[str, tuple[int, list[str]]] = {
    "kernels: device code and launchers": (2828, ["kernels/moe_triton_kernels/*.py"]),
    "kernels: gluon": (987, ["kernels/moe_triton_kernels/gluon/*.py"]),
    "kernels: tools": (777, ["kernels/moe_triton_kernels/tools/*.py"]),
    "modules beside the folders": (1468, ["src/moe_triton/*.py", "src/moe_triton/reference/*.py"]),
    "backends": (1937, ["src/moe_triton/backends/**/*.py"]),
    "autograd": (456, ["src/moe_triton/autograd/*.py"]),
    "layers": (696, ["src/moe_triton/layers/*.py"]),
    "distributed": (4344, ["src/moe_triton/distributed/**/*.py"]),
    "quantization": (0, ["src/moe_triton/quantization/*.py"]),
    "metrics": (0, ["src/moe_triton/metrics/*.py"]),
    "replay": (0, ["src/moe_triton/replay/*.py"]),
    "integrations": (567, ["src/moe_triton/integrations/*.py"]),
    "compat": (4593, ["src/moe_triton/compat/**/*.py"]),
    "training": (1600, ["src/moe_triton/training/*.py"]),
    "simulate": (910, ["src/moe_triton/simulate/*.py"]),
    "benchmarking": (4308, ["src/moe_triton/benchmarking/**/*.py"]),
    "cli": (2012, ["src/moe_triton/cli/*.py"]),
}


def place(frame: FrameType) -> tuple[str, str] | None:
    """(file, function) of a frame of ours; None for any other."""
    path = frame.f_code.co_filename
    for folder in CODE:
        if path.startswith(folder + os.sep):
            return path[len(folder) + 1 :], frame.f_code.co_qualname
    return None


def chain(run: Callable[[], object], backend: str) -> list[tuple[str, str]]:
    """Return the calls that are under way when `run` reaches the first product, outermost first."""
    found: list[tuple[str, str]] = []

    def record(frame: FrameType, event: str, _argument: object) -> None:
        if event != "call" or found or place(frame) != PRODUCT[backend]:
            return
        at: FrameType | None = frame
        while at is not None:
            if (here := place(at)) is not None and here[0] not in WRAPPERS:
                found.insert(0, here)
            at = at.f_back

    sys.setprofile(record)
    try:
        run()
    finally:
        sys.setprofile(None)
    assert found, f"{PRODUCT[backend]} was not reached"
    return found


def chain_of_layer(backend: str, expert_parallel: ExpertParallel | None = None) -> list[tuple[str, str]]:
    # more weights than those of experts that one compiled loop runs on a CPU
    layer = MoE(128, 64, num_experts=44, top_k=2, backend=backend, expert_parallel=expert_parallel)
    x = torch.randn(128, 128, requires_grad=True)
    layer(x)  # imports the backend
    return chain(lambda: layer(x), backend)


def chain_over_ranks() -> list[tuple[str, str]]:
    """The chain of expert parallelism: a group of one rank that exchanges with itself runs what many ranks run."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            return chain_of_layer("torch", ExpertParallel(make_groups(ep=1), always_exchange=True))
        finally:
            dist.destroy_process_group()


def chains() -> dict[str, str]:
    found = {
        "calls on one process, torch backend": chain_of_layer("torch"),
        "calls on one process, triton backend": chain_of_layer("triton"),
        "calls over ranks, torch backend": chain_over_ranks(),
    }
    texts = {}
    for name, calls in found.items():
        width = max(len(file) for file, _ in calls)
        rows = [f"{number:4}  {file:{width}}  {function}" for number, (file, function) in enumerate(calls, 1)]
        texts[name] = "\n".join(["```text", *rows, "```", ""])
    return texts


def lines(patterns: list[str]) -> int:
    paths = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def sizes() -> str:
    rows = ["| folder | before | now |", "|---|--:|--:|"]
    rows += [f"| {name} | {before:,} | {lines(patterns):,} |" for name, (before, patterns) in SIZES.items()]
    before, now = sum(before for before, _ in SIZES.values()), lines(["src/**/*.py", "kernels/**/*.py"])
    return "\n".join([*rows, f"| together | {before:,} | {now:,} |", ""])


def filled(text: str, parts: dict[str, str]) -> str:
    """The page with these parts in place of what stands between their markers."""
    return MARKED.sub(
        lambda match: match[1] + parts.get(match[2], match[0][len(match[1]) : -len(match[3])]) + match[3], text
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="architecture", description="Make the generated parts of ARCHITECTURE.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a call chain differs")
    options = parser.parse_args()
    text, parts = PAGE.read_text(encoding="utf-8"), chains()
    if options.check:
        missing = set(parts) - {name for _, name, _ in MARKED.findall(text)}
        if missing or filled(text, parts) != text:
            print(f"{PAGE.name}: differs from the code; python docs/architecture.py writes it")
            return 1
        return 0
    PAGE.write_text(filled(text, parts | {"sizes": sizes()}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
