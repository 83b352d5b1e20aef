"""The tables of figures in the documents are made from the results, by benchmarks/tables.py."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import tables  # noqa: E402


def test_the_documents_hold_what_their_results_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_every_table_is_somewhere() -> None:
    found = [found for path in tables.DOCUMENTS for found in tables.MARKED.findall(path.read_text())]
    assert {name for _, name, script, _ in found if script == "tables"} == set(tables.TABLES)
    for _, name, script, _ in found:
        assert (BENCHMARKS / f"{script}.py").exists(), name


def test_every_cell_of_the_comparison_has_a_source() -> None:
    found = json.loads((tables.ROOT / "docs" / "comparison.json").read_text())
    names = {peer["name"] for peer in found["peers"]}
    for row in found["rows"]:
        assert (tables.ROOT / "docs" / row["page"]).exists(), row["feature"]
        assert set(row["peers"]) <= names, row["feature"]
        for cell in (row, *row["peers"].values()):
            assert cell["found"] in ("yes", "part", "no"), row["feature"]
        for name, cell in row["peers"].items():
            assert cell["source"].startswith("https://"), (row["feature"], name)
            assert cell["text"], (row["feature"], name)


def test_figures_are_svg_and_name_what_they_show() -> None:
    for name, draw in tables.FIGURES.items():
        root = ElementTree.fromstring(draw())
        words = " ".join(root.itertext())
        expected = {"layer.svg": ("dispatch", "d_hidden"), "speed.svg": ("moe_triton", *tables.LABELS.values())}[name]
        assert all(word in words for word in expected), name
        width = float(root.get("width"))
        marks = [element for element in root.iter() if element.tag.endswith(("rect", "text"))]
        assert len(marks) > 20
        assert all(0 <= float(mark.get("x")) < width for mark in marks), name


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
