"""The table and the chart of benchmarks/fp8_curves.py, from results that are already there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


def run_of(dtype: str, fp8: bool, backend: str, seed: int, loss: float) -> dict[str, Any]:
    what = {"model": "moe", "dtype": dtype, "fp8": fp8, "backend": backend, "seed": seed}
    return {**what, "held_out_loss": loss, "parameters": 1000, "curve": [5.0, 2.0, loss]}


def test_table_and_chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import fp8_curves

    sizes = {"steps": 9, "batch_size": 2, "seq_len": 8, "num_layers": 2, "num_experts": 4, "top_k": 2}
    sizes |= {"hidden_size": 128, "intermediate_size": 64}
    about = {"processor": "a processor", "machine": "a machine", "versions": {"torch": "2.13.0"}, "config": sizes}
    losses = {
        ("bfloat16", False, "auto"): (2.0, 1.0, 1.0, 1.0, 1.0, 1.0),
        ("bfloat16", True, "auto"): (2.02, 0.995, 1.001, 1.01, 1.01, 1.01),
        ("bfloat16", False, "reference"): (2.0, 0.99),
        ("float32", False, "auto"): (2.0, 1.01, 1.0),
    }
    runs = [run_of(*what, seed, loss) for what, of_seeds in losses.items() for seed, loss in enumerate(of_seeds)]
    del runs[0]["backend"]  # as older results lack it
    (tmp_path / "curves.json").write_text(json.dumps({**about, "runs": runs}), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["fp8_curves.py", "--report", "--out", str(tmp_path)])
    fp8_curves.main()
    assert capsys.readouterr().out.splitlines()[2:10] == [
        "| 0 | 2.0000 | 2.0200 (+1.00%) | 2.0000 (+0.00%) | 2.0000 (+0.00%) |",
        "| 1 | 1.0000 | 0.9950 (-0.50%) | 0.9900 (-1.00%) | 1.0100 (+1.00%) |",
        "| 2 | 1.0000 | 1.0010 (+0.10%) | - | 1.0000 (+0.00%) |",
        *(f"| {seed} | 1.0000 | 1.0100 (+1.00%) | - | - |" for seed in (3, 4, 5)),
        "| mean of 0 to 2 | 1.3333 | 1.3387 (+0.40% ± 0.44%) | - | 1.3367 (+0.25% ± 0.33%) |",
        "| mean of 0 to 5 | 1.1667 | 1.1743 (+0.66% ± 0.26%) | - | - |",
    ]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    table = fp8_curves.table({**about, "runs": runs[:7]}).splitlines()  # runs that are not there yet
    assert table[2:9] == [
        "| 0 | 2.0000 | 2.0200 (+1.00%) | - | - |",
        *(f"| {seed} | 1.0000 | - | - | - |" for seed in range(1, 6)),
        "",
    ]
