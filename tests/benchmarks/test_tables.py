"""The tables of figures in the documents are made from the results, by benchmarks/tables.py."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import tables  # noqa: E402


def test_the_documents_hold_what_their_results_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_every_table_is_somewhere() -> None:
    names = [name for path in tables.DOCUMENTS for _, name, _ in tables.MARKED.findall(path.read_text())]
    assert set(names) == set(tables.TABLES)


def is_figure(cell: str) -> bool:
    if re.fullmatch(r"\d+\.\d+\.\d+", cell.strip()):  # a version
        return False
    return re.fullmatch(r"[*\d., ()x%-]*\d[*\d., ()x%-]*", cell.strip()) is not None


@pytest.mark.parametrize("path", tables.DOCUMENTS, ids=lambda path: path.name)
def test_no_figures_are_written_by_hand(path: Path) -> None:
    """Behind the first cell, a row of a table outside the markers holds words."""
    for line in tables.MARKED.sub("", path.read_text()).splitlines():
        if line.startswith("|"):
            cells = line.strip("|").split("|")[1:]
            assert 2 * sum(map(is_figure, cells)) < len(cells), line


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The results and two documents, in a folder of their own."""
    (tmp_path / "assets").mkdir()
    shutil.copytree(tables.RESULTS, tmp_path / "results")
    documents = [tmp_path / "training.md", tmp_path / "page.md"]
    shutil.copy(tables.ROOT / "docs" / "training.md", documents[0])
    shutil.copy(tables.PAGE, documents[1])
    for name, value in (
        ("ROOT", tmp_path),
        ("RESULTS", tmp_path / "results"),
        ("PAGE", documents[1]),
        ("DOCS", tmp_path),
        ("DOCUMENTS", documents[:1]),
    ):
        monkeypatch.setattr(tables, name, value)
    tables.main([])
    return tmp_path


def test_a_changed_result_is_found_and_written(copies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copies / "results" / "training" / "seeds.json"
    found = json.loads(path.read_text())
    found["runs"][0]["held_out_loss"] = 1.5
    path.write_text(json.dumps(found))
    before = (copies / "training.md").read_text()
    assert tables.main(["--check"]) == 1
    assert capsys.readouterr().out == "training.md: differs from its results\n"
    assert (copies / "training.md").read_text() == before
    assert tables.main([]) == 0
    after = (copies / "training.md").read_text()
    assert "| mixture of experts | 1.5000 | 1.2550 |" in after
    assert after.splitlines()[:60] == before.splitlines()[:60]  # the rest is left alone
    assert tables.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: seeds (benchmarks/tables.py) -->\n", "a marker of a table has no partner"),
        ("<!-- end of table -->\n", "a marker of a table has no partner"),
        ("<!-- table: x (benchmarks/tables.py) -->\n<!-- end of table -->\n", "table: got 'x', wanted one of"),
    ],
)
def test_a_broken_marker_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        tables.filled(text)
