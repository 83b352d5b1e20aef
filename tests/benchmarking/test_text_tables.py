"""Tables that fit the width they are given."""

from __future__ import annotations

import re

import pytest
from rich.console import Console
from typer.testing import CliRunner

from moe_triton.benchmarking import report, runner
from moe_triton.benchmarking.text_tables import narrow, print_table
from moe_triton.cli import app
from tests.benchmarking.test_session import CASE, run_of

COLUMNS = ("who", "ms", "of roof", "saved MiB", "note")
ROWS = [("ours", "12.3 (11.9-12.8)", "0.93", "28", ""), ("a peer", "23.5 (22.1-24.9)", "0.49", "224", "few samples")]


def narrowed(width: int):
    return narrow(COLUMNS, ROWS, width, ("who", "note"), ("saved MiB", "of roof"))


def test_what_is_left_out_first():
    whole = narrowed(200)
    assert (whole.columns, whole.rows, whole.notes) == (list(COLUMNS), [list(row) for row in ROWS], [])
    without_note = narrowed(whole.width() - 1)
    assert without_note.columns == list(COLUMNS[:-1])
    assert without_note.notes == ["a peer: few samples"]  # and no line for a note that is empty
    medians = narrowed(without_note.width() - 1)
    assert [row[1] for row in medians.rows] == ["12.3", "23.5"]
    less = narrowed(medians.width() - 1)
    assert less.left_out == ["saved MiB"]
    assert narrowed(1).columns == ["who", "ms"]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider_than_the_console(width, capsys):
    print_table(Console(width=width), COLUMNS, ROWS, ("who", "note"), ("saved MiB", "of roof"))
    assert max(map(len, capsys.readouterr().out.splitlines())) <= width


def test_the_tables_of_bench_and_its_stages_fit_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(runner, "measure_case", lambda case, *, modes, **_: (run_of(case, mode) for mode in modes))
    shape = ("--tokens=40", "--hidden=16", "--intermediate=8", "--experts=8", "--top-k=2")
    done = CliRunner().invoke(app, ["bench", *shape, "--device=cpu", "--budget=0", "--mode=full"])
    assert done.exit_code == 0, done.output
    table = done.stdout.split("self-check: the same")[0]
    assert max(map(len, table.splitlines())) <= 80
    for text in ("moe_triton (torch)", "1000", "2.00x", "not installed: gone", "without "):
        assert text in table


def test_a_fault_stays_in_a_narrow_table(capsys):
    run = run_of(CASE, "full")
    run.rows[1].status = "mismatch"
    report.print_runs([run], Console(width=60))
    assert "MISMATCH" in capsys.readouterr().out


def test_no_boxes_and_no_colours_where_there_is_no_terminal():
    for arguments in (["--help"], ["info"], []):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0
        assert not re.search("[\u2500-\u257f\x1b]", done.stdout), arguments
