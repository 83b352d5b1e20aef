"""benchmarks/host_overhead.py, in a process of its own: it exchanges Triton's launcher."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "host_overhead.py"


def test_a_decoding_layer_has_five_launches(tmp_path: Path) -> None:
    """Where torch has no product of 16-bit operands to fp32, as on a CPU, the gate's is one of them."""
    out = tmp_path / "found.json"
    command = [sys.executable, SCRIPT, "--tokens", "1,8", "--repeats", "3", "--json", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("T=1: 5 launches, ")
    found = json.loads(out.read_text())
    for row in found["forward"].values():
        assert row["launches"] == 5  # gate, route with the dispatch and its tiles, up, down, combine
        assert row["forward_us"] > 0
