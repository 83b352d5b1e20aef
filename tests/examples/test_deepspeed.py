"""The DeepSpeed scripts: one learns, saves, and goes on where it was; one has the same losses with either MoE layer."""

from __future__ import annotations

import re
from pathlib import Path

from tests.helpers.deepspeed_parity import reset, start_deepspeed
from tests.helpers.examples import run_example


def run(name: str, *arguments: str) -> str:
    start_deepspeed()
    try:
        return run_example(name, *arguments)
    finally:
        reset()


def test_deepspeed_train(two_ranks, tmp_path: Path):
    script, folder = "deepspeed_train.py", str(tmp_path / "run")
    first, other = two_ranks.run(run, script, "--out", folder, "--steps", "6")
    again, _ = two_ranks.run(run, script, "--out", folder, "--steps", "11")
    assert "step" not in other
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", first + again)]
    assert len(losses) == 3, "steps 0, 5 and 10"
    assert losses[2] < losses[1] < losses[0]
    assert "goes on at step 6" in again


def test_deepspeed_swap(two_ranks):
    printed, _ = two_ranks.run(run, "deepspeed_swap.py", "--steps", "3")
    assert float(re.search(r"largest relative difference over 3 steps: ([\d.e+-]+)", printed)[1]) < 1e-5
