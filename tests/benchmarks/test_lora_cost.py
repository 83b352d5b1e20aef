"""The script that measures what LoRA costs: it runs, its ways agree, and adapters keep nothing of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import lora_cost

SIZES = {"tokens": 12, "hidden": 8, "intermediate": 8, "experts": 4, "top-k": 2, "rank": 4, "budget": 0}


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "cost.json"
    monkeypatch.setattr(
        sys, "argv", ["lora_cost.py", *(f"--{name}={size}" for name, size in SIZES.items()), f"--out={result}"]
    )
    lora_cost.main()
    record = json.loads(result.read_text())
    ways = record["ways"]
    assert list(ways) == ["frozen", "lora", "deltas", "grouped_mm", "eager"]
    assert ways["lora"]["saved_bytes"] == ways["frozen"]["saved_bytes"]
    assert all(way["error"] < 1e-6 for name, way in ways.items() if name != "frozen")  # PEFT's gradients included
    assert ways["deltas"]["saved_bytes"] > ways["frozen"]["saved_bytes"]
    assert record["peft"]
    assert capsys.readouterr().out.count("\n") == 2 + len(ways) + 1
