"""The LoRA example: what it prints."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_finetune_lora(capsys: pytest.CaptureFixture[str]) -> None:
    """Every loss equals that of the eager experts; merged, saved and reloaded the model has the trained one's."""
    runpy.run_path(str(EXAMPLES / "finetune_lora.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert "moe_triton.swap: 2 swapped, 0 left alone" in lines
    rows = {}
    for line in lines:
        if found := re.match(
            r"(step \d|trained|merged|reloaded) +loss ([\d.]+)(?:  with eager experts ([\d.]+))?", line
        ):
            rows[found[1]] = [float(value) for value in found.groups()[1:] if value]
    assert list(rows) == [*(f"step {i}" for i in range(1, 6)), "trained", "merged", "reloaded"]
    for name, losses in rows.items():
        assert max(losses) - min(losses) <= 5e-6, name
        if name in ("merged", "reloaded"):
            assert abs(losses[0] - rows["trained"][0]) <= 5e-6, name
    assert rows["step 5"][0] < rows["step 1"][0] - 0.3
