"""The DeepSpeed script: it learns, saves, and goes on where it was."""

from __future__ import annotations

import re
from pathlib import Path

from tests.helpers.deepspeed_parity import reset, start_deepspeed
from tests.helpers.examples import run_example


def run(folder: str, steps: int) -> str:
    start_deepspeed()
    try:
        return run_example("deepspeed_train.py", "--out", folder, "--steps", str(steps))
    finally:
        reset()


def test_deepspeed_train(two_ranks, tmp_path: Path):
    first, other = two_ranks.run(run, str(tmp_path / "run"), 6)
    again, _ = two_ranks.run(run, str(tmp_path / "run"), 11)
    assert "step" not in other
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", first + again)]
    assert len(losses) == 3, "steps 0, 5 and 10"
    assert losses[2] < losses[1] < losses[0]
    assert "goes on at step 6" in again
