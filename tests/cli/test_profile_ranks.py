"""`moe-triton profile` under torchrun: the exchange of every rank, and the part of it that nothing overlaps."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from moe_triton.benchmarking.exchange import common, length, merged, read_exchange
from moe_triton.cli import app
from moe_triton.cli.arguments import EXIT_USAGE
from tests.helpers.commands import run_command

LAYER = ["--tokens=30", "--hidden=16", "--intermediate=8", "--experts=4", "--top-k=2", "--dtype=float32"]
INTERVALS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted).map(tuple), max_size=8)


def test_two_processes(tmp_path):
    """As torchrun starts them."""
    options = ["--device=cpu", "--steps=3", "--out", tmp_path, "--ep-chunks=2"]
    printed = run_command(["profile", *LAYER, *options], tmp_path / "printed", processes=2)
    assert printed.count("forward and backward: ") == 1, "one process speaks for both"
    for text in (
        "T=30 d=16 n=8 E=4 K=2",
        "experts over 2 processes, mode dropless, 2 chunks",
        "exposed ms",
        "waiting for",
        "rows of the busiest rank: ",
    ):
        assert text in printed
    exchange = json.loads((tmp_path / "profile.json").read_text())["exchange"]
    assert (exchange["mode"], exchange["chunks"]) == ("dropless", 2)
    assert [rank["tokens"] for rank in exchange["ranks"]] == [15, 15]
    for number, rank in enumerate(exchange["ranks"]):
        assert rank["rank"] == number
        assert 0 < rank["rows"] <= 30  # at most one of every token
        assert 0 < rank["exposed_s"] <= rank["exchange_s"] <= rank["step_s"]
        assert rank["overlap"] == pytest.approx(1 - rank["exposed_s"] / rank["exchange_s"])
        assert 0.9 * rank["exposed_s"] <= sum(rank["waits"].values()) <= rank["step_s"]
        assert any("rows" in phase for phase in rank["waits"])
        trace = json.loads((tmp_path / f"trace-rank-{number}.json").read_text())
        assert sum(event["name"] == "moe::step" for event in trace["traceEvents"]) == 3


def test_what_does_not_go_together(tmp_path, monkeypatch):
    def said(*options: str) -> str:
        done = CliRunner().invoke(app, ["profile", "--device=cpu", "--out", str(tmp_path), *options])
        assert done.exit_code == EXIT_USAGE
        return done.stderr

    assert "got one without torchrun" in said(*LAYER, "--ep-mode=capacity")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "got one under torchrun" in said("--training-step")
    assert "got one under torchrun" in said("--kernel=up")


def write_trace(path, events):
    whole = [{"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start} for cat, name, start, end in events]
    path.write_text(json.dumps({"traceEvents": [*whole, {"ph": "M", "name": "process_name"}]}))


def test_a_trace_on_a_cpu(tmp_path):
    step = [
        ("user_annotation", "moe::step", 100, 200),
        ("cpu_op", "gloo:all_to_all", 110, 150),
        ("cpu_op", "gloo:all_to_all", 140, 160),
        ("user_annotation", "moe_triton: rows", 105, 110),
        ("user_annotation", "moe_triton, wait: rows", 130, 145),
        ("user_annotation", "moe_triton, wait: gradients", 170, 175),
        ("cpu_op", "moe_triton, wait: rows", 130, 145),
    ]
    second = [(cat, name, start + 1000, end + 1000) for cat, name, start, end in step]
    barrier = [("cpu_op", "gloo:barrier", 20, 90), ("cpu_op", "gloo:barrier", 1020, 1090)]
    write_trace(tmp_path / "t.json", [*step, *second, *barrier])
    found = read_exchange(tmp_path / "t.json", torch.device("cpu"), steps=2, rank=1, tokens=7)
    assert (found.rank, found.tokens) == (1, 7)
    assert found.step_s == pytest.approx(100e-6)
    assert found.exchange_s == pytest.approx(50e-6)  # the two overlap by 10
    assert found.exposed_s == pytest.approx(15e-6)
    assert found.overlap == pytest.approx(0.7)
    assert found.waits == pytest.approx({"rows": 15e-6, "gradients": 5e-6})


def test_a_trace_on_a_gpu(tmp_path):
    events = [
        ("user_annotation", "moe::step", -60, -40),  # the host is ahead
        ("kernel", "ncclDevKernel_AllReduce", -30, -10),  # the barrier
        ("gpu_user_annotation", "moe::step", 0, 100),
        ("kernel", "ncclDevKernel_SendRecv", 10, 40),
        ("kernel", "up_kernel", 0, 20),
        ("kernel", "down_kernel", 35, 60),
    ]
    write_trace(tmp_path / "t.json", events)
    found = read_exchange(tmp_path / "t.json", torch.device("cuda"), steps=1, rank=0, tokens=7)
    assert found.exchange_s == pytest.approx(30e-6)
    assert found.exposed_s == pytest.approx(15e-6)


@given(left=INTERVALS, right=INTERVALS)
def test_lengths_of_unions_and_of_what_is_common(left, right):
    def covered(intervals):
        return {tick for start, end in intervals for tick in range(start, end)}

    assert length(left) == len(covered(left))
    assert common(left, right) == len(covered(left) & covered(right))
    union = merged(left)
    assert all(a[1] < b[0] for a, b in pairwise(union))
