"""`moe-triton tune`: climbing, what may not win, what dies on the way, going on, and the files."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from dataclasses import asdict, replace
from typing import ClassVar

import pytest
import torch
from typer.testing import CliRunner

from moe_triton.benchmarking import tuning
from moe_triton.benchmarking.cases import Case, make_workload
from moe_triton.benchmarking.kernel_search import Outcome, Searched
from moe_triton.benchmarking.timing import CpuTimer
from moe_triton.cli import app
from moe_triton.cli.arguments import EXIT_NO_GPU, EXIT_USAGE
from moe_triton.kernel_stages import STAGES_OF
from moe_triton_kernels.launch import Config

command = importlib.import_module("moe_triton.cli.tune")
CASE = Case(tokens=20, hidden=32, intermediate=16, experts=4, top_k=2)
SHAPE = ["--tokens=20", "--hidden=32", "--intermediate=16", "--experts=4", "--top-k=2", "--dtype=float32"]
FACTS = {"device": {"name": "a GPU"}, "versions": {"torch": "2.13", "ptxas": "12.9.86"}, "commit": {"hash": "ab" * 20}}
SETTINGS = tuning.Settings(device=torch.device("cpu"), seed=0, threads=1, candidate_s=0.0)
TINY = Case(tokens=8, hidden=16, intermediate=16, experts=3, top_k=2)  # for the interpreter
(PROBLEM,) = tuning.problems_of([CASE], ["down"], "interpreter")
INCUMBENT = {
    "block_m": 16, "block_n": 16, "block_k": 16, "num_warps": 4, "num_stages": 1, "group": 2, "parts": 1,
    "programs_per_sm": 1, "gluon": None, "descriptors": False, "maxnreg": 255,
}  # fmt: skip


class FakeWorker:
    """Answers at once: the fewer rows in a tile's group the faster, and some configurations go wrong."""

    asked: ClassVar[list[dict]] = []
    deaths = 0

    def __init__(self, *_):
        self.ready = {"incumbent": INCUMBENT, "architecture": "interpreter"}

    def ask(self, question, patience_s):
        config, against = question["config"], question["against"]
        FakeWorker.asked.append(config)
        if config["num_stages"] > 1:
            FakeWorker.deaths += 1
            raise tuning.Crashed("the process died (signal 11)")
        if config["num_warps"] != 4:
            return asdict(Outcome(status="wrong", error=1.0, ratio=None))
        ratio = (config["block_m"] / against["block_m"]) ** -0.5 * config["group"] / against["group"]
        return asdict(Outcome(status="ok", time_s=ratio, ratio=ratio, error=1e-7))

    def close(self):
        pass


@pytest.fixture
def fake(monkeypatch):
    FakeWorker.asked, FakeWorker.deaths = [], 0
    monkeypatch.setattr(tuning, "Worker", FakeWorker)
    return FakeWorker


def progress(path, **circumstances):
    return tuning.Progress(path=path, circumstances={"device": "a GPU", **circumstances})


def test_it_climbs_to_the_fastest_and_survives_what_fails(tmp_path, fake):
    state = tuning.search(PROBLEM, progress(tmp_path / "p.json"), SETTINGS, 60.0, lambda *_: None)
    assert state.is_done
    assert state.incumbent == INCUMBENT
    assert (state.best["block_m"], state.best["group"]) == (128, 1)
    assert state.best_ratio == pytest.approx((128 / 16) ** -0.5 / 2)
    assert (state.best["num_warps"], state.best["num_stages"]) == (4, 1)  # neither wrong nor dead ones win
    statuses = {outcome["status"] for outcome in state.tried.values()}
    assert statuses == {"ok", "wrong", "failed"}
    assert fake.deaths >= 1
    keys = [json.dumps(config) for config in fake.asked]
    assert len(keys) == len(set(keys))  # nothing is tried twice
    assert tuning.confirmed_ratio(PROBLEM, state, SETTINGS) < tuning.GAIN


class Hopper(FakeWorker):
    """Schedules are quick beside what runs; a shorter group of plain tiles is quicker still where `plain_wins`."""

    plain_wins = False

    def __init__(self, *_):
        self.ready = {"incumbent": INCUMBENT, "architecture": "sm_90"}

    def seconds(self, config):
        if config["gluon"] is not None:
            return {"cooperative": 0.9, "ping_pong": 0.8}.get(config["gluon"], 0.95) + 0.02 * config["group"]
        return (0.3 if self.plain_wins else 1.0) if config["group"] == 1 else 1.0

    def ask(self, question, patience_s):
        FakeWorker.asked.append(question["config"])
        ratio = self.seconds(question["config"]) / self.seconds(question["against"])
        return asdict(Outcome(status="ok", time_s=ratio, ratio=ratio, error=1e-3))


@pytest.mark.parametrize("plain_wins", [False, True])
def test_schedules_are_tried_beside_plain_kernels(tmp_path, fake, monkeypatch, plain_wins):
    """The winner goes into the table, whichever kind it is; neither kind hides the other's neighbours."""
    monkeypatch.setattr(tuning, "Worker", Hopper)
    monkeypatch.setattr(Hopper, "plain_wins", plain_wins)
    monkeypatch.setattr(tuning, "broken_gates", lambda *_: "")
    (problem,) = tuning.problems_of([replace(CASE, dtype="bfloat16", tokens=2000)], ["down"], "sm_90")
    state = tuning.search(problem, progress(tmp_path / "p.json"), SETTINGS, 60.0, lambda *_: None)
    tried = {(config["gluon"], config["group"]) for config in fake.asked}
    assert {("cooperative", 2), ("ping_pong", 2), (None, 1)} <= tried
    winner = (None, 1) if plain_wins else ("ping_pong", 1)
    assert (state.best["gluon"], state.best["group"]) == winner
    assert tuning.entry_of(problem, state, 0.8, FACTS)["config"]["gluon"] == winner[0]
    assert state.plain["gluon"] is None


def test_a_schedule_behind_which_the_plain_kernel_would_run_does_not_win():
    """In the interpreter there is none: the candidate failed, and says why."""
    searched = Searched(make_workload(TINY, torch.device("cpu")), "down", CpuTimer())
    outcome = searched.try_out(replace(searched.incumbent, gluon="ping_pong"), searched.incumbent, 0.0)
    assert outcome.status == "failed"
    assert outcome.note == "ping_pong: the plain kernel would run: architecture interpreter, wanted one of sm_90"
    for op in STAGES_OF:
        searched = Searched(make_workload(TINY, torch.device("cpu")), op, CpuTimer())
        assert searched.verify(replace(searched.incumbent, gluon="cooperative")).status == "failed"


def test_an_interrupted_search_goes_on(tmp_path, fake):
    path = tmp_path / "p.json"
    tried = []

    def stop(words, outcome):
        tried.append(words)
        if len(tried) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuning.search(PROBLEM, progress(path), SETTINGS, 60.0, stop)
    before = list(fake.asked)
    again = progress(path)
    again.load()
    tuning.search(PROBLEM, again, SETTINGS, 60.0, lambda *_: None)
    assert not [config for config in fake.asked[3:] if config in before]
    total = len(fake.asked)
    tuning.search(PROBLEM, again, SETTINGS, 60.0, lambda *_: None)
    assert len(fake.asked) == total  # it is done
    other = progress(path, source="other code")
    other.load()
    assert other.state(PROBLEM).tried == {}


def test_seeds_come_first_and_a_broken_gate_may_not_win(tmp_path, fake, monkeypatch):
    first, second = ({**INCUMBENT, "block_m": rows, "maxnreg": 128} for rows in (128, 64))
    monkeypatch.setattr(tuning, "seeds", lambda *_: [Config(**first), Config(**second)])
    monkeypatch.setattr(tuning, "broken_gates", lambda _, config: "spills 8" if config == first else "")
    state = tuning.search(PROBLEM, progress(tmp_path / "p.json"), SETTINGS, 60.0, lambda *_: None)
    assert fake.asked[:2] == [first, second]
    assert state.tried[json.dumps(first)]["status"] == "failed"
    assert state.tried[json.dumps(first)]["note"] == "spills 8"
    assert state.tried[json.dumps(second)]["status"] == "ok"


def test_the_gates_of_a_candidate():
    (problem,) = tuning.problems_of([replace(CASE, dtype="bfloat16")], ["down"], "sm_90")
    assert tuning.broken_gates(PROBLEM, INCUMBENT) == ""  # nothing is compiled for the interpreter
    assert "shared_bytes" in tuning.broken_gates(
        problem, {**INCUMBENT, "block_m": 128, "block_n": 256, "block_k": 128, "num_stages": 6, "num_warps": 8}
    )


def test_no_time_is_one_candidate(tmp_path, fake):
    state = tuning.search(PROBLEM, progress(tmp_path / "p.json"), SETTINGS, 0.0, lambda *_: None)
    assert not state.is_done
    assert len(fake.asked) <= 1


def test_the_table_keeps_one_entry_per_key(tmp_path):
    path = tmp_path / "t.json"
    state = tuning.State(incumbent=INCUMBENT, best={**INCUMBENT, "block_m": 32}, tried={"a": {}, "b": {}})
    entry = tuning.entry_of(PROBLEM, state, 0.8, FACTS)
    other = {**entry, "n": 99}
    entries = tuning.merge([other, {**entry, "config": INCUMBENT}], PROBLEM, entry)
    assert entries == [other, entry]
    tuning.write_table(path, entries)
    assert tuning.read_table(path) == sorted(entries, key=json.dumps)
    assert len(path.read_text().splitlines()) == 2 + 2
    assert entry["measured"]["device"] == "a GPU"
    assert entry["measured"]["versions"]["ptxas"] == "12.9.86"
    assert entry["measured"]["commit"] == "ab" * 20
    assert entry["measured"]["time_over_incumbent"] == 0.8
    assert tuning.merge(entries, PROBLEM, None) == [other]
    tuning.write_table(path, [])
    assert tuning.read_table(path) == []


def test_problems_are_distinct_table_entries():
    cases = [replace(CASE, tokens=tokens) for tokens in (20, 22, 4000)]
    found = tuning.problems_of(cases, ["up", "d_weight"], "sm_90")
    assert [(p.name, p.bucket) for p in found] == [
        ("up_gated", 16), ("d_weight", 16), ("up_gated", 128), ("d_weight", 128)
    ]  # fmt: skip


def test_codes_have_problems_of_their_own():
    """Only what decodes codes in its loop: with so many rows the others are tuned as they run, without a format."""
    few = Case(tokens=64, hidden=64, intermediate=32, experts=8, top_k=2, dtype="bfloat16", format="fp8")
    many = replace(few, tokens=1 << 16)
    found = tuning.problems_of([few, many], list(STAGES_OF), "sm_90")
    assert [problem.op for problem in found] == ["down", "d_hidden", "d_rows"]  # 32 rows of gate are no whole block
    assert {problem.key["dtype"] for problem in found} == {"bfloat16 fp8"}
    assert found[0].title() == "down d=64 n=32 bfloat16 fp8 up to 16 rows per expert"
    assert all(config.gluon is None for config in tuning.first_candidates(found[0], Config(**INCUMBENT)))
    with pytest.raises(ValueError, match="format: got 'fp8' where up, down, d_hidden, d_weight, d_rows read no codes"):
        tuning.problems_of([many], list(STAGES_OF), "sm_90")


# Real kernels, in the interpreter -------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{}, {"activation": "relu2"}, {"activation": "gpt_oss", "bias": True}], ids=str)
def test_every_operation_is_verified_against_float64(change):
    workload = make_workload(replace(TINY, **change), torch.device("cpu"))
    for op in STAGES_OF:
        searched = Searched(workload, op, CpuTimer())
        assert 0 < searched.error(searched.incumbent) < 2e-5


def test_a_wrong_result_may_not_win(monkeypatch):
    workload = make_workload(TINY, torch.device("cpu"))
    for op in STAGES_OF:
        searched = Searched(workload, op, CpuTimer())
        stage = searched.stages[-1]
        right = searched.kernels.call(stage)

        def spoiled(right=right):
            result = right()
            tensors = result if isinstance(result, tuple) else (result,)
            tensors[0][1] = 0  # one row, or one expert's gradient
            return result

        monkeypatch.setitem(searched.kernels.calls, stage, spoiled)
        outcome = searched.try_out(searched.incumbent, searched.incumbent, 0.0)
        assert outcome.status == "wrong", op
        assert outcome.ratio is None


def test_a_candidate_that_raises_is_a_result(monkeypatch):
    searched = Searched(make_workload(TINY, torch.device("cpu")), "down", CpuTimer())
    outcome = searched.try_out(replace(searched.incumbent, block_m=48), searched.incumbent, 0.0)
    assert outcome.status == "failed"
    assert "block_m" in outcome.note


def test_the_worker_answers_and_its_death_is_noticed(monkeypatch):
    with contextlib.closing(tuning.Worker(PROBLEM, SETTINGS.device, 0, 1)) as worker:
        assert worker.ready == {"incumbent": INCUMBENT, "architecture": "interpreter"}
        asked = {"config": {**INCUMBENT, "block_m": 32}, "against": INCUMBENT, "budget_s": 0.0}
        outcome = Outcome(**worker.ask(asked, 120.0))
        assert outcome.status == "ok"
        assert outcome.error < 2e-5
        worker.process.kill()
        with pytest.raises(tuning.Crashed, match="died"):
            worker.ask(asked, 60.0)
    monkeypatch.setattr(tuning.Worker, "command", (sys.executable, "-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(tuning, "START_S", 0.2)
    with pytest.raises(tuning.Crashed, match="no answer"):
        tuning.Worker(PROBLEM, SETTINGS.device, 0, 1)


# The command ----------------------------------------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner().invoke(app, ["tune", *arguments])


def test_the_command_writes_a_table_that_the_library_reads(tmp_path, fake):
    path = tmp_path / "deep" / "t.json"
    done = invoke(*SHAPE, "--device=cpu", "--ops=down", "--table", str(path))
    assert done.exit_code == 0, done.output
    assert "x as fast as 16x16x16" in done.stdout
    assert f"export MOE_TRITON_TABLE={path}" in done.stdout
    (entry,) = json.loads(path.read_text())
    assert (entry["op"], entry["architecture"], entry["bucket"]) == ("down", "interpreter", 16)
    assert entry["config"]["block_m"] == 128
    assert sorted(p.name for p in path.parent.iterdir()) == ["t.json", "t.progress.json"]
    asked = len(fake.asked)
    assert invoke(*SHAPE, "--device=cpu", "--ops=down", "--table", str(path)).exit_code == 0
    assert len(fake.asked) == asked + 1  # the search is done: only the winner is confirmed once more


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "suite: missing; name one"),
        (["--suite=nope"], "suite: got 'nope'"),
        ([*SHAPE, "--ops=sideways"], "ops: got 'sideways', wanted one of up"),
        ([*SHAPE, "--budget=-1"], "budget: got -1.0"),
        ([*SHAPE, "--candidate-seconds=-1"], "candidate-seconds: got -1.0"),
        ([*SHAPE, "--dry-run", "--arch=sm_1"], "arch: got 'sm_1', wanted one of sm_80"),
        ([*SHAPE, "--table=/"], "table: / is a directory"),
        ([*SHAPE, "--table=/proc/no/t.json"], "table: cannot write to /proc/no"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    done = invoke("--device=cpu", *arguments)
    assert done.exit_code == EXIT_USAGE
    assert message in done.stderr
    assert "Traceback" not in done.output


def test_broken_files_are_named_and_left_alone(tmp_path, fake):
    path = tmp_path / "t.json"
    path.write_text("{")
    done = invoke(*SHAPE, "--device=cpu", "--table", str(path))
    assert done.exit_code == EXIT_USAGE
    assert str(path) in done.stderr
    path.write_text("[]")
    (tmp_path / "t.progress.json").write_text('{"schema": "other"}')
    done = invoke(*SHAPE, "--device=cpu", "--table", str(path))
    assert done.exit_code == EXIT_USAGE
    assert "is no progress of moe-triton tune" in done.stderr
    assert path.read_text() == "[]"


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    done = invoke(*SHAPE, "--device=cpu")
    assert done.exit_code == EXIT_NO_GPU
    assert "--dry-run needs none" in done.stderr


def test_a_dry_run_lists_candidates_and_gates(monkeypatch):
    def gates(problem, configs, on_report):
        assert problem.architecture == "sm_90"
        report = {"registers": 212, "spills": 0, "shared_bytes": 147456}
        on_report(configs[0], {"report": report, "broken": [], "error": ""})
        on_report(configs[1], {"report": report, "broken": ["shared_bytes 294912 > 232448"], "error": ""})
        on_report(configs[2], {"report": None, "broken": [], "error": "OutOfResources: no"})

    monkeypatch.setattr(tuning, "offline_gates", gates)
    done = invoke("--dry-run", "--suite=models", "--ops=down")
    assert done.exit_code == 0, done.output
    assert "down d=2048 n=1024 bfloat16 more than 64 rows per expert, sm_90" in done.stdout
    for text in ("147456", "ok", "shared_bytes 294912 > 232448", "OutOfResources: no"):
        assert text in done.stdout


def test_a_compiler_that_dies_costs_one_candidate(monkeypatch):
    program = "import sys, json, os; json.load(sys.stdin); print(json.dumps({'report': {}}), flush=True); os.abort()"
    real = tuning.subprocess.Popen
    monkeypatch.setattr(
        tuning.subprocess, "Popen", lambda command, **options: real([sys.executable, "-c", program], **options)
    )
    seen = []
    tuning.offline_gates(PROBLEM, [{"a": i} for i in range(4)], lambda config, found: seen.append((config, found)))
    assert [config["a"] for config, _ in seen] == [0, 1, 2, 3]
    assert [bool(found.get("error")) for _, found in seen] == [False, True, False, True]
