"""The table and the chart of benchmarks/routers.py, from results that are already there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


def run_of(router: str, seed: int, loss: float) -> dict[str, Any]:
    numbers = {"held_out_loss": loss, "load_entropy": 0.9, "dropped": 0.01, "experts_per_token": 1.5}
    return {"model": "moe", "router": router, "seed": seed, **numbers}


def test_table_and_chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import routers

    sizes = {"steps": 4, "batch_size": 2, "seq_len": 8, "num_experts": 4, "top_k": 2, "capacity_factor": 2.0}
    runs = [run_of("softmax", seed, 2.0 + 0.1 * seed) for seed in range(3)]
    runs += [run_of("expert_choice", 0, 1.05), run_of("hash", 0, 2.31)]
    results = {"processor": "a processor", "config": sizes, "runs": runs}
    (tmp_path / "routers.json").write_text(json.dumps(results), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["routers.py", "--report", "--out", str(tmp_path)])
    routers.main()
    lines = (tmp_path / "routers.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("| `")]
    assert table == [
        "| `expert_choice`\\* | 1 | 1.0500 ± 0.0000 | 0.900 | 0.0100 | 1.50 | -50.00% |",
        "| `softmax` | 3 | 2.1000 ± 0.1000 | 0.900 | 0.0100 | 1.50 | +0.00% |",
        "| `hash` | 1 | 2.3100 ± 0.0000 | 0.900 | 0.0100 | 1.50 | +10.00% |",
    ]
    assert any(line.startswith("\\* `expert_choice`: not causal") for line in lines)
    assert (tmp_path / "routers.png").read_bytes().startswith(b"\x89PNG")
    assert "| `hash` |" in capsys.readouterr().out
