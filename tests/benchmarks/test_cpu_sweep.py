"""The sweep over numbers of tokens: a small run of it, and what its table says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cpu_sweep


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cpu_sweep, "PEERS", ("grouped_mm",))
    cpu_sweep.main(["--tokens", "1,4096", "--layers", "tiny", "--budget", "0.4", "--out", str(tmp_path)])
    (part,) = json.loads((tmp_path / "cpu-sweep.json").read_text())["parts"]
    assert {run["case"]["tokens"] for run in part["runs"]} == {1}
    assert [run["mode"] for run in part["runs"]] == ["forward", "full"]
    assert {cell["tokens"] for cell in part["left_out"]} == {4096}
    assert all(row["status"] == "ok" for run in part["runs"] for row in run["rows"])
    assert (tmp_path / "cpu-sweep.png").stat().st_size > 1000
    table = (tmp_path / "cpu-sweep.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("not measured") == 2


def test_measured_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_sweep, "PEERS", ())
    monkeypatch.setattr(cpu_sweep, "fits", lambda *_: True)
    options = ["--layers", "tiny", "--budget", "0.2", "--out", str(tmp_path)]
    cpu_sweep.main(["--tokens", "1,2", *options])
    cpu_sweep.main(["--tokens", "2,4", "--add", *options])
    first, second = cpu_sweep.read(tmp_path / "cpu-sweep.json")
    assert [run.case.tokens for run in first.runs] == [1, 1]
    assert [run.case.tokens for run in second.runs] == [2, 2, 4, 4]
    assert (tmp_path / "cpu-sweep.md").read_text().count("| tiny |") == 6
    cpu_sweep.main(["--tokens", "1", *options])
    (only,) = cpu_sweep.read(tmp_path / "cpu-sweep.json")
    assert [run.case.tokens for run in only.runs] == [1, 1]


@pytest.mark.parametrize(("factor", "word"), [(1.2, "1.20x,"), (1.02, "tie"), (0.98, "tie"), (0.9, "behind")])
def test_the_nearest_peer_decides(factor: float, word: str) -> None:
    speedups = {name: SimpleNamespace(p50=p50) for name, p50 in (("hf-eager", 3.0), ("grouped_mm", factor))}
    run: Any = SimpleNamespace(speedups=speedups)
    assert word in cpu_sweep.verdict(run)
    assert cpu_sweep.verdict(run).endswith("grouped_mm")
