"""`moe-triton profile`: the tables, the trace that Perfetto can read, memory over time, and the messages."""

from __future__ import annotations

import json

import pytest
import torch
from torch.profiler import record_function
from typer.testing import CliRunner

from moe_triton.benchmarking import limits, profiling
from moe_triton.benchmarking.memory_chart import draw_memory, outermost
from moe_triton.cli import app
from moe_triton.cli.arguments import EXIT_NO_GPU, EXIT_USAGE

SHAPE = ["--tokens=20", "--hidden=32", "--intermediate=16", "--experts=4", "--top-k=2", "--dtype=float32"]
QUICK = ["--device=cpu", "--steps=2", "--budget=0"]


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    monkeypatch.setattr(limits, "CPU_BUFFER_BYTES", 1 << 12)


def invoke(*arguments):
    return CliRunner().invoke(app, ["profile", *arguments])


def check_trace(path):
    """What the Trace Event Format asks of a file, as far as Perfetto reads it."""
    content = json.loads(path.read_text())
    events = content["traceEvents"]
    assert len(events) > 100
    for event in events:
        assert isinstance(event["name"], str)
        assert event["ph"] in "XBEiICNODMPsftbnev"
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert {"ts", "pid", "tid"} <= set(event)
    return events


def test_a_layer(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_TRITON_CPU_LOOPS", "0")  # else one compiled loop runs all experts of so small a layer
    done = invoke(*SHAPE, *QUICK, "--out", str(tmp_path / "p"))
    assert done.exit_code == 0, done.output
    for text in (
        "route", "experts (backward)", "furthest from its floor: ", "inside experts: ", "matrix products",
        "experts: load ", "proton: not measured on this machine", "for want of a GPU", "ui.perfetto.dev",
    ):  # fmt: skip
        assert text in done.stdout, text
    names = [e["name"] for e in check_trace(tmp_path / "p" / "trace.json")]
    for stage in ("gate", "route", "dispatch", "experts", "experts (backward)", "layer forward", "layer backward"):
        assert names.count(f"moe::{stage}") == 2, stage
    found = json.loads((tmp_path / "p" / "profile.json").read_text())
    assert found["schema"] == "moe-triton-profile/1"
    assert sum(found["load"]["counts"]) == 40
    assert found["peak_bytes"] > 0
    timed = [row for row in found["stages"]["stages"] if row["time_s"] is not None]
    assert len(timed) == 7
    assert sum(row["share"] for row in timed if not row["is_backward"]) == pytest.approx(1.0)
    assert (tmp_path / "p" / "memory.png").read_bytes()[:4] == b"\x89PNG"
    assert {p.name for p in (tmp_path / "p").iterdir()} == {"trace.json", "memory.png", "profile.json"}


def test_a_layer_over_codes(tmp_path):
    shape = ["--tokens=20", "--hidden=32", "--intermediate=32", "--experts=4", "--top-k=2", "--dtype=float32"]
    done = invoke(*shape, *QUICK, "--format=mxfp4", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "float32 mxfp4" in done.stdout
    found = json.loads((tmp_path / "profile.json").read_text())["stages"]
    assert found["case"]["format"] == "mxfp4"
    assert {row["name"] for row in found["stages"] if row["time_s"]} == {"gate", "route", "dispatch", "experts"}
    for wrong, message in (
        (["--format=fp3"], "format: got 'fp3'"),
        (["--format=mxfp4", "--kernel=d_weight_up"], "kernel: got 'd_weight_up', wanted one of up, down"),
    ):
        refused = invoke(*shape, *QUICK, *wrong, "--out", str(tmp_path))
        assert refused.exit_code == EXIT_USAGE
        assert message in refused.stderr


def test_a_training_step(tmp_path):
    options = ["--hidden=16", "--intermediate=8", "--experts=4", "--top-k=2"]
    done = invoke("--training-step", *options, *QUICK, "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    for text in ("attention (forward)", "experts (backward)", "optimizer", "experts of layer 1: load", "dropped: "):
        assert text in done.stdout, text
    check_trace(tmp_path / "trace.json")
    found = json.loads((tmp_path / "profile.json").read_text())
    assert sum(part["share"] for part in found["parts"]) == pytest.approx(1.0)
    assert min(part["seconds"] for part in found["parts"]) >= 0
    assert found["config"]["hidden_size"] == 16


def test_one_kernel_in_the_interpreter(tmp_path):
    done = invoke(*SHAPE, *QUICK, "--kernel=down", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    line = next(line for line in done.stdout.splitlines() if "16x16x16 warps 4 stages 1" in line)
    assert line.rstrip().endswith("runs")
    assert "they say nothing about a GPU" in done.stderr


def test_one_kernel_needs_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    done = invoke(*SHAPE, *QUICK, "--kernel=down", "--out", str(tmp_path))
    assert done.exit_code == EXIT_NO_GPU
    assert "not measured on this machine: --kernel times Triton kernels" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=nope"], "model: got 'nope', wanted one of"),
        (["--model=OLMoE", "--hidden=8"], "model: got 'OLMoE' together with hidden"),
        (["--hidden=8"], "tokens, intermediate, experts, top_k: missing"),
        ([*SHAPE, "--steps=0"], "steps: got 0, wanted at least 1"),
        ([*SHAPE, "--backend=reference"], "backend: got 'reference', wanted one of auto"),
        ([*SHAPE, "--skew=odd"], "skew: got 'odd'"),
        ([*SHAPE, "--kernel=sideways"], "kernel: got 'sideways', wanted one of up"),
        ([*SHAPE, "--out=/proc/no"], "--out: cannot write to /proc/no"),
        (["--training-step", "--hidden=7"], "hidden_size: got 7"),
        (["--training-step", "--model=OLMoE"], "training-step: got together with a layer's options"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message, tmp_path):
    rest = [] if any(a.startswith("--out") for a in arguments) else ["--out", str(tmp_path)]
    done = invoke("--device=cpu", *arguments, *rest)
    assert done.exit_code == EXIT_USAGE
    assert message in done.stderr
    assert "Traceback" not in done.output


def test_ranges_are_read_back_with_the_operators_inside(tmp_path):
    a = torch.randn(40, 40)

    def step():
        with profiling.span("outer"):
            a @ a
            with profiling.span("inner"):
                a.add(1)
        with record_function("not ours"):
            a.mul(2)

    trace = profiling.record(step, 3, torch.device("cpu"), tmp_path / "t.json")
    assert [r.name for r in trace.ranges] == ["outer", "inner"] * 3
    assert len(trace.seconds["moe::outer"]) == 3
    assert trace.inside["outer"]["matrix products"] > 0
    assert trace.inside["inner"]["activation and scaling"] > 0
    assert "matrix products" not in trace.inside["inner"]
    assert [r.name for r in outermost(trace, trace.ranges[0].start_us)] == ["outer"] * 3
    assert max(m.bytes for m in trace.memory) >= a.nbytes
    assert draw_memory(tmp_path / "m.png", trace, "outer", "title")
    assert not draw_memory(tmp_path / "n.png", trace, "absent", "title")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.png", "t.json"]


def test_annotations_end_with_the_block_and_survive_errors():
    class Breaks(torch.nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    module = Breaks()
    with profiling.annotated([("m", module)]):
        with pytest.raises(RuntimeError, match="broken"):
            module(1)
        assert module._forward_hooks
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_a_backend_that_cannot_run_here_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for words in (SHAPE, ["--training-step"]):
        done = invoke(*words, *QUICK, "--backend=triton", "--out", str(tmp_path / "p"))
        assert done.exit_code == EXIT_NO_GPU
        assert "not measured on this machine: backend: got 'triton'" in done.stderr
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "p").exists()


def test_a_training_step_refuses_a_layers_tokens(tmp_path):
    done = invoke("--training-step", "--tokens=64", *QUICK, "--out", str(tmp_path / "p"))
    assert done.exit_code == EXIT_USAGE
    assert "training-step: got together with a layer's options" in done.stderr
    assert not (tmp_path / "p").exists()
