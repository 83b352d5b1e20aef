"""A run that is interrupted and goes on, results that are compared, and the report."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_triton.benchmarking import comparing, limits, page, report, runner, session
from moe_triton.benchmarking.cases import Case
from moe_triton.benchmarking.results import Row, Run, read_results
from moe_triton.benchmarking.runner import relate
from moe_triton.cli import app
from moe_triton.cli.arguments import EXIT_FAULT, EXIT_INTERRUPTED, EXIT_SLOWER, EXIT_USAGE, SHAPE
from moe_triton.cli.display import StepDisplay, duration
from moe_triton.files import locked

CASE = Case(tokens=40, hidden=32, intermediate=24, experts=8, top_k=2)
FACTS = {
    "created": "2026-01-01T00:00:00+00:00",
    "device": {"device": "cpu", "name": "a CPU", "threads": 2},
    "platform": "Linux",
    "versions": {"torch": "2.13.0", "deepspeed": None},
    "commit": {"hash": "ab" * 20, "dirty": False},
}


def run_of(
    case: Case, mode: str, ours_s: float = 1.0, again_s: float = 1.01, peer_s: float = 2.0, dense_s: float = 0.5
) -> Run:
    """A run with made-up times."""
    rows = [
        Row(name="auto", label="moe_triton (torch)", kind="ours", times_s=[ours_s] * 3, errors={"output": 1e-7}),
        Row(name="peer", label="a <peer>", kind="peer", times_s=[peer_s] * 3, errors={"output": 1e-7}),
        Row(name="gone", label="gone", kind="peer", status="not installed", note="gone is not installed"),
        Row(name="auto again", label="self-check", kind="check", times_s=[again_s] * 3),
        Row(name="dense", label="limit: dense", kind="limit", times_s=[dense_s] * 3),
    ]
    return relate(case, mode, [10] * 8, rows)


def invoke(*arguments: str):
    shape = [f"--{name.replace('_', '-')}={getattr(CASE, name)}" for name in SHAPE]
    return CliRunner().invoke(app, ["bench", *shape, "--device", "cpu", "--budget", "0", *arguments])


@pytest.fixture
def measured(monkeypatch):
    """Replaces the measurement by made-up times; gives the list of cells that were asked for."""
    cells = []

    def measure(case, *, modes, **_):
        for mode in modes:
            cells.append((case.dtype, mode))
            yield run_of(case, mode)

    monkeypatch.setattr(runner, "measure_case", measure)
    return cells


# Resuming -------------------------------------------------------------------------------------------------------------


def test_a_run_reads_back_as_it_was_written(tmp_path):
    path = tmp_path / "r.json"
    first = session.Session(path=path, facts=FACTS, settings={"budget_s": 1.0}, source="s")
    keys = [first.key(CASE, mode, ["auto"]) for mode in ("forward", "full")]
    first.add(keys[0], run_of(CASE, "forward"))
    assert read_results(path, "x").runs == first.runs
    again = session.Session(path=path, facts={**FACTS, "created": "later"}, settings={"budget_s": 1.0}, source="s")
    again.resume()
    assert again.key(CASE, "forward", ["auto"]) in again.found
    assert again.key(CASE, "full", ["auto"]) not in again.found


@pytest.mark.parametrize(
    "change",
    [{"source": "t"}, {"settings": {"budget_s": 2.0}}, {"facts": {**FACTS, "versions": {"torch": "2.12.0"}}}],
    ids=["code", "settings", "versions"],
)
def test_a_cell_of_other_circumstances_is_not_taken_over(change):
    base = {"path": None, "facts": FACTS, "settings": {"budget_s": 1.0}, "source": "s"}
    assert session.Session(**base).key(CASE, "forward", ["auto"]) != session.Session(**{**base, **change}).key(
        CASE, "forward", ["auto"]
    )


def test_an_interrupted_run_goes_on(tmp_path, measured, monkeypatch):
    folder = tmp_path / "report"
    arguments = ("--dtype", "float32,bfloat16", "--mode", "forward,full", "--report", str(folder))
    monkeypatch.setattr("sys.argv", ["moe-triton", "bench"])
    plain = runner.measure_case

    def stopped(case, *, modes, **rest):
        yield from plain(case, modes=modes[:1], **rest)
        if case.dtype == "bfloat16":
            raise KeyboardInterrupt
        yield from plain(case, modes=modes[1:], **rest)

    monkeypatch.setattr(runner, "measure_case", stopped)
    done = invoke(*arguments)
    assert done.exit_code == EXIT_INTERRUPTED
    assert "3 of 4 cells are done; the same command goes on" in done.stderr
    assert "moe_triton (torch)" in done.stdout
    assert len(read_results(folder / "results.json", "x").runs) == 3

    monkeypatch.setattr(runner, "measure_case", plain)
    measured.clear()
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    assert measured == [("bfloat16", "full")]
    assert "3 of 4 cells were measured before" in done.stderr
    assert f"report: {folder / 'report.html'}" in done.stdout
    names = {p.name for p in folder.iterdir()}
    assert names == {"report.html", "results.json", "results.csv", "chart-forward.png", "chart-full.png"}

    measured.clear()
    assert invoke(*arguments).exit_code == 0
    assert measured == []
    assert invoke(*arguments, "--fresh").exit_code == 0
    assert len(measured) == 4


def test_a_full_disk_loses_nothing(tmp_path, measured, monkeypatch):
    path = tmp_path / "r.json"
    assert invoke("--mode", "forward", "--json", str(path)).exit_code == 0
    before = path.read_text()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(os, "replace", full)
    done = invoke("--mode", "forward,full", "--json", str(path))
    assert done.exit_code == EXIT_FAULT
    assert f"cannot write {path}: No space left on device; what was there before is intact" in done.stderr
    assert "Traceback" not in done.output
    assert "moe_triton (torch)" in done.stdout  # what was measured is shown
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is no result of moe-triton bench"),
        ('{"schema": "other"}', "schema 'other'"),
        ('{"schema": "moe-triton-bench/2"}', "holds a broken run"),
        ('{"schema": "moe-triton-bench/2", "runs": [{"case": {}}]}', "holds a broken run"),
    ],
)
def test_a_file_that_is_no_result_is_named_and_left_alone(tmp_path, measured, text, message):
    path = tmp_path / "r.json"
    path.write_text(text)
    for option in ("--json", "--compare"):
        done = invoke(option, str(path))
        assert done.exit_code == EXIT_USAGE
        assert message in done.stderr
    assert path.read_text() == text
    assert measured == []


def test_results_of_the_first_schema_are_readable():
    root = Path(__file__).parents[2]
    found = read_results(root / "benchmarks" / "results" / "cpu" / "cpu-2-cores.json", "x")
    assert len(found.runs) == 12
    assert found.runs[0].row("auto").time_s.p50 > 0
    assert found.runs[0].self_check is None


def test_two_commands_on_one_file_are_refused(tmp_path, measured):
    path = tmp_path / "r.json"
    with locked(tmp_path / ".r.json.lock"):
        done = invoke("--json", str(path))
    assert done.exit_code == EXIT_USAGE
    assert f"--json: process {os.getpid()} on " in done.stderr
    assert f"is working on {path}" in done.stderr
    assert measured == []
    assert invoke("--json", str(path)).exit_code == 0
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


def test_results_are_on_disk_before_they_replace_the_old_ones(tmp_path, monkeypatch):
    order = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("sync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append("rename"), rename(old, new)))
    report.write_json(tmp_path / "r.json", {"a": 1})
    assert order == ["sync", "rename", "sync"]  # the file, the new name, the directory


# Comparing ------------------------------------------------------------------------------------------------------------


def test_slower_cells_are_listed_worst_first():
    old = [run_of(CASE, mode) for mode in ("forward", "full", "backward")]
    new = [run_of(CASE, "forward", ours_s=1.1, again_s=1.1), run_of(CASE, "full", ours_s=1.2, again_s=1.2, peer_s=3.0)]
    found = comparing.compare(old, new, 0.05)
    assert [(c.label, c.mode) for c in found.slower] == [("moe_triton (torch)", mode) for mode in ("full", "forward")]
    assert found.slower[0].ratio == pytest.approx(1.2)
    assert [(c.label, c.ratio) for c in found.peers] == [("a <peer>", pytest.approx(1.5))]
    assert found.compared == 4  # limits, the self-check and who has no times are not compared
    assert found.missing == [f"{CASE.title()}, backward"]
    assert comparing.compare(old, new, 0.6).slower == []
    text = "\n".join(report.comparison_lines(found))
    assert "2 of our 2 times are more than 5% slower" in text
    assert "which fails nothing" in text
    assert "+50.0%" in text


def test_a_slower_machine_is_not_a_slower_layer():
    old = [run_of(CASE, "full")]
    all_slower = comparing.compare(old, [run_of(CASE, "full", 2.5, 2.5, 5.0, dense_s=1.25)], 0.05)
    assert [c.machine for c in all_slower.changes] == [pytest.approx(2.5)] * 2  # new over old, as `ratio`
    assert all_slower.slower == all_slower.peers == []
    ours_alone = comparing.compare(old, [run_of(CASE, "full", 2.5, 2.5, 2.0, dense_s=0.5)], 0.05)
    assert len(ours_alone.slower) == 1


def test_nothing_is_concluded_from_a_cell_that_is_not_steady():
    found = comparing.compare([run_of(CASE, "full")], [run_of(CASE, "full", ours_s=1.2, again_s=1.3)], 0.05)
    assert found.slower == []
    assert [c.mode for c in found.inconclusive] == ["full"]
    assert "inconclusive" in "\n".join(report.comparison_lines(found))


def test_compare_exits_by_what_it_finds(tmp_path, measured):
    path, doctored, other = (tmp_path / f"{name}.json" for name in ("r", "doctored", "other"))
    arguments = ("--mode", "forward", "--json", str(path))
    assert invoke(*arguments).exit_code == 0
    done = invoke(*arguments, "--compare", str(path))
    assert done.exit_code == 0, done.output
    assert "none of our 1 times are more than 5% slower" in done.stdout

    content = json.loads(path.read_text())
    content["runs"][0]["rows"][0]["time_s"]["p50"] *= 0.8
    doctored.write_text(json.dumps(content))
    done = invoke(*arguments, "--compare", str(doctored))
    assert done.exit_code == EXIT_SLOWER
    assert "+25.0%  moe_triton (torch)" in done.stdout
    assert invoke(*arguments, "--compare", str(doctored), "--fail-over", "30%").exit_code == 0

    content["runs"][0]["case"]["tokens"] = 41
    other.write_text(json.dumps(content))
    done = invoke(*arguments, "--compare", str(other))
    assert done.exit_code == EXIT_USAGE
    assert "no time of any cell that was measured now" in done.stderr


# The self-check, the report, the progress -----------------------------------------------------------------------------


@pytest.mark.parametrize(("again", "steady"), [(1.029, True), (0.972, True), (1.031, False), (0.969, False)])
def test_the_self_check_knows_a_noisy_cell(again, steady):
    run = run_of(CASE, "forward", again_s=again)
    assert run.is_steady == steady
    assert ("NOT STEADY" in report.self_check_line([run])) != steady
    assert "auto again" not in run.speedups


def test_the_twin_is_measured_beside_the_rest(monkeypatch):
    monkeypatch.setattr(limits, "CPU_BUFFER_BYTES", 1 << 16)
    done = invoke("--providers", "auto", "--mode", "forward")
    assert done.exit_code == 0, done.output
    assert "self-check: moe_triton (torch) again" in done.stdout
    assert "the same provider twice differs by at most" in done.stdout


class Checker(HTMLParser):
    """Collects the text, what is loaded from elsewhere, and tags that are not closed."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.loaded = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_is_one_whole_page():
    runs = [run_of(CASE, "forward"), run_of(CASE, "full", again_s=1.5), run_of(replace(CASE, tokens=50), "full")]
    found = comparing.compare(runs, runs, 0.05)
    html = page.render(runs, FACTS, "moe-triton bench --suite cpu", comparison=found)
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    assert checker.loaded == []  # nothing beside it
    text = " ".join(checker.text)
    for part in (
        "a <peer>",
        "ours is 2.00x as fast",
        "gone is not installed",
        "NOT STEADY: 1 of 3 cells",
        "moe-triton bench --suite cpu",
        "a CPU",
        "none of our 3 times",
        "abababab",
        "1e-07",
    ):
        assert part in text, part
    assert 'name="viewport"' in html


def test_the_csv_has_a_line_per_cell_and_row():
    lines = report.csv_table([run_of(CASE, "forward")]).splitlines()
    assert len(lines) == 1 + 5
    header = lines[0].split(",")
    own = dict(zip(header, lines[1].split(","), strict=True))
    assert (own["tokens"], own["mode"], own["provider"], own["p50_ms"]) == ("40", "forward", "auto", "1000.0")
    assert own["of_dense"] == "0.5"
    assert dict(zip(header, lines[2].split(","), strict=True))["ours_is_faster"] == "2.0"


def test_the_time_left_follows_the_pace():
    now = [0.0]
    display = StepDisplay(4, cell_s=10.0, clock=lambda: now[0])
    assert display.left_s(0.5) == pytest.approx(35.0)
    now[0] = 30.0
    display.finish_cell()
    assert display.left_s(0.0) == pytest.approx(90.0)
    assert StepDisplay().left_s(0.0) is None
    assert [duration(s) for s in (0.2, 60, 600, 7200)] == ["1 s", "60 s", "10 min", "2.0 h"]


def test_the_progress_says_who_runs(capsys):
    display = StepDisplay()
    for who in ("ours", "peer", "ours", "peer"):
        display.step("a case, full", 0.0, who)
    display.step("a case, backward", 0.0, "ours")
    lines = ["a case, full: ours", "a case, full: peer", "a case, backward: ours"]
    assert capsys.readouterr().err.splitlines() == lines


def test_few_samples_are_noted_with_the_reason():
    run = run_of(CASE, "full", peer_s=50.0)
    assert runner.few_samples(run.row("peer"), run) == "3 samples only, for it takes 50 times as long as ours"
    assert runner.few_samples(run.row("auto"), run) == "3 samples only"
    assert runner.few_samples(replace(run.row("peer"), times_s=[None, 19.0, None], name="else"), run) == "1 sample only"
