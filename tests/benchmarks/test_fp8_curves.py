"""The table and the chart of benchmarks/fp8_curves.py, from results that are already there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


def run_of(dtype: str, fp8: bool, seed: int, loss: float) -> dict[str, Any]:
    what = {"model": "moe", "dtype": dtype, "fp8": fp8, "seed": seed}
    return {**what, "held_out_loss": loss, "parameters": 1000, "curve": [5.0, 2.0, loss]}


def test_table_and_chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import fp8_curves

    sizes = {"steps": 9, "batch_size": 2, "seq_len": 8, "num_layers": 2, "num_experts": 4, "top_k": 2}
    sizes |= {"hidden_size": 128, "intermediate_size": 64}
    about = {"processor": "a processor", "machine": "a machine", "versions": {"torch": "2.13.0"}, "config": sizes}
    losses = {("float32", False): (2.0, 1.01), ("bfloat16", False): (2.0, 1.0), ("bfloat16", True): (2.02, 0.995)}
    runs = [run_of(*what, seed, loss) for what, of_seeds in losses.items() for seed, loss in enumerate(of_seeds)]
    (tmp_path / "curves.json").write_text(json.dumps({**about, "runs": runs}), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["fp8_curves.py", "--report", "--out", str(tmp_path)])
    fp8_curves.main()
    assert capsys.readouterr().out.splitlines()[2:5] == [
        "| 0 | 2.0000 | 2.0200 (+1.00%) | 2.0000 (+0.00%) |",
        "| 1 | 1.0000 | 0.9950 (-0.50%) | 1.0100 (+1.00%) |",
        "| mean | 1.5000 | 1.5075 (+0.50%) | 1.5050 (+0.33%) |",
    ]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
