"""The example of a transformers model over ranks: the losses of one process, and a folder that transformers loads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_example():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
    script = ["examples/expert_parallel_transformers.py", "--steps", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *script], capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    losses = re.findall(r"over 4 ranks ([\d.]+), in one process ([\d.]+)", done.stdout)
    assert len(losses) == 4
    for spread, alone in losses:
        assert float(spread) == pytest.approx(float(alone), abs=2e-5)
    assert float(losses[-1][0]) < float(losses[0][0])
    assert "experts 0 to 1 of 8 on this rank" in done.stdout
    assert "loaded by AutoModelForCausalLM" in done.stdout
