"""What all commands share: JSON instead of words, exit codes in the help, a way on where something ends."""

from __future__ import annotations

import json
import os

import pytest
from typer.testing import CliRunner

from moe_triton.benchmarking import tuning
from moe_triton.benchmarking.profiling import without_own_lines
from moe_triton.cli import app
from moe_triton.training.config import TrainConfig

SHAPE = ("--tokens=8", "--hidden=16", "--intermediate=8", "--experts=4", "--top-k=2")
TINY = ("--num-layers=1", "--hidden-size=8", "--intermediate-size=4", "--num-experts=2", "--top-k=1")


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def tiny_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    return text


def test_alone_it_shows_what_people_come_for():
    done = run()
    assert done.exit_code == 0
    for command in ("moe-triton bench", "moe-triton profile", "moe-triton train", "moe_triton.swap", "--help"):
        assert command in done.stdout


@pytest.mark.parametrize("command", ["info", "bench", "profile", "inspect", "tune", "train", "simulate"])
def test_every_help_has_the_exit_codes_and_json(command):
    text = run(command, "--help").stdout
    assert "Exit code: 0" in text
    assert "--json" in text


def test_bench_prints_json_and_no_tables():
    done = run("bench", *SHAPE, "--device=cpu", "--budget=0", "--mode=forward", "--providers=auto", "--json", "-")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["runs"][0]["mode"] == "forward"
    assert "1 shape x forward, 1 cell on" in done.stderr


def test_profile_prints_json_and_ends_with_what_to_try_next(tmp_path):
    arguments = ("profile", *SHAPE, "--device=cpu", "--budget=0", "--steps=1", "--out", str(tmp_path))
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads((tmp_path / "profile.json").read_text())
    assert done.stderr.splitlines()[-1].startswith("next: ")


def test_a_dry_run_needs_no_shape(monkeypatch):
    monkeypatch.setattr(
        tuning,
        "offline_gates",
        lambda _, configs, on_report: on_report(configs[0], {"report": {"registers": 7}, "broken": [], "error": ""}),
    )
    done = run("tune", "--dry-run", "--ops=down", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)[0]["registers"] == "7"


def test_train_prints_its_summary_and_says_how_a_longer_run_begins(tmp_path, tiny_text):
    out = str(tmp_path / "run")
    common = ("train", "--out", out, "--data", str(tiny_text), "--batch-size=4", "--seq-len=16", "--num-heads=1")
    done = run(*common, *TINY, "--steps=1", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["config"]["device"] == TrainConfig().device
    longer = run("train", "--out", out, "--resume", "--steps=2")
    assert longer.exit_code == 2
    assert "a longer run is a new one, in another --out" in longer.stderr
    again = run("train", "--out", out, "--resume")
    assert "it is finished; for more steps, start a new run in another --out" in again.stdout


def test_the_profilers_own_lines_are_held_back_and_no_others(capfd):
    with without_own_lines():
        os.write(2, b"USDT:2026-01-01 profiler_start\na warning\nCUPTI failed, code 35\n")
    assert capfd.readouterr().err == "a warning\n"
