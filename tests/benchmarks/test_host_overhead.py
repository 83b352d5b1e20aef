"""benchmarks/host_overhead.py, in a process of its own: it exchanges Triton's launcher."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "host_overhead.py"


def test_a_decoding_layer_has_five_launches_and_few_calls(tmp_path: Path) -> None:
    """Where torch has no product of 16-bit operands to fp32, as on a CPU, the gate's is one of them; else four."""
    out = tmp_path / "found.json"
    command = [sys.executable, SCRIPT, "--tokens", "1,128", "--repeats", "3", "--json", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("T=1: 5 launches, ")
    found = json.loads(out.read_text())
    for row in found["forward"].values():  # 8 and 1024 assignments
        assert row["launches"] == ["product_kernel", "small_route_kernel", "up_kernel", "down_kernel", "combine_kernel"]
        assert row["forward_us"] > 0
        assert row["operators"] <= 24
        assert row["calls"] <= 175  # 528 before choices were looked up, 330 before launches were prepared
