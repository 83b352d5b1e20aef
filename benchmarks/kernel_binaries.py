"""Compile every kernel for Hopper, with no GPU, and keep what the binaries hold for the table of docs/kernels.md.

    python benchmarks/kernel_binaries.py

A minute or two where Triton's cache has the binaries, else ten. What is kept are `moe-triton inspect`'s rows of the
configurations that it shows by default, without the floors, and the versions of Triton and ptxas.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import triton

from moe_triton.benchmarking.environment import commit, now
from moe_triton.benchmarking.report import write_json
from moe_triton_kernels.compiler import ptxas_version

ARCH = "sm_90"
RESULT = Path(__file__).parent / "results" / "offline" / f"{ARCH}.json"
KEPT = ("kernel", "registers", "spills", "shared_bytes", "loop", "wgmma", "mma", "cp_async", "tma", "resident_blocks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "moe_triton", "inspect", "--arch", ARCH, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows = [{key: row[key] for key in KEPT} for row in json.loads(done.stdout)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    versions = {"triton": triton.__version__, "ptxas": ptxas_version(ARCH)}
    write_json(options.out, {"created": now(), "commit": commit(), "arch": ARCH, "versions": versions, "rows": rows})
    print(f"{options.out}: {len(rows)} kernels")


if __name__ == "__main__":
    main()
