"""The script that compares decoding over codes with bf16 runs, and leaves the environment as it was."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cpu_codes

from moe_triton.backends.torch.fused import VARIABLE

SIZES = {"tokens": 3, "hidden": 64, "intermediate": 32, "experts": 4, "top-k": 2, "threads": 1, "budget": 0}


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cpu_codes, "FORMATS", ("mxfp4",))
    monkeypatch.setenv(VARIABLE, "1")
    result = tmp_path / "codes.json"
    arguments = [*(f"--{name}={size}" for name, size in SIZES.items()), f"--out={result}", "--json"]
    monkeypatch.setattr(sys, "argv", ["cpu_codes.py", *arguments])
    cpu_codes.main()
    record = json.loads(result.read_text())
    assert {"bf16", "mxfp4, by torch"} <= set(record["ways"])
    assert record["ways"]["bf16"]["times_bf16"]["p50"] == 1
    assert record["ways"]["mxfp4, by torch"]["bytes"] == record["ways"]["bf16"]["bytes"] * 4.25 / 16
    assert os.environ[VARIABLE] == "1"
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("{") :]) == record
