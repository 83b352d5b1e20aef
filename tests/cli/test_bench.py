"""`moe-triton bench` as a user runs it: the table, the files, the exit codes and the messages."""

from __future__ import annotations

import json
import os
import statistics
from importlib.metadata import version

import pytest
import torch
from typer.testing import CliRunner

from moe_triton import runtime
from moe_triton.benchmarking import environment, limits, runner
from moe_triton.benchmarking.providers import PROVIDERS
from moe_triton.benchmarking.providers.block import Provider, Unavailable
from moe_triton.cli import app
from moe_triton.cli.arguments import EXIT_FAULT, EXIT_NO_GPU, EXIT_USAGE

SHAPE = ["--tokens", "40", "--hidden", "32", "--intermediate", "24", "--experts", "8", "--top-k", "2"]
QUICK = ["--device", "cpu", "--budget", "0"]


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    monkeypatch.setattr(limits, "CPU_BUFFER_BYTES", 1 << 16)


def run(*arguments: str):
    return CliRunner().invoke(app, ["bench", *arguments])


def test_one_shape_gives_a_table_and_all_files(tmp_path):
    json_file, chart, table = tmp_path / "b.json", tmp_path / "b.png", tmp_path / "b.md"
    files = ["--json", str(json_file), "--chart", str(chart), "--markdown", str(table)]
    few = ["--providers", "auto,hf-eager,hf-grouped_mm"]
    done = run(*SHAPE, *QUICK, *few, "--dtype", "float32,bfloat16", *files)
    assert done.exit_code == 0, done.output
    assert "moe_triton (torch)" in done.stdout
    assert "transformers grouped_mm" in done.stdout
    assert "of floor" in done.stdout
    assert "\x1b[" not in done.stdout  # plain text where there is no terminal

    found = json.loads(json_file.read_text())
    assert found["schema"] == "moe-triton-bench/2"
    keys = {"schema", "created", "device", "platform", "versions", "commit", "settings", "runs", "stages"}
    assert set(found) == keys
    assert found["device"]["device"] == "cpu"
    assert found["versions"]["torch"] == version("torch")
    assert [(r["case"]["dtype"], r["mode"]) for r in found["runs"]] == [
        (dtype, mode) for dtype in ("float32", "bfloat16") for mode in ("forward", "backward", "full")
    ]
    for one in found["runs"]:
        assert sum(one["counts"]) == 80
        assert one["ours"] == "auto"
        rows = {row["name"]: row for row in one["rows"]}
        assert [name for name, row in rows.items() if row["kind"] == "limit"] == ["roof", "dense", "floor"]
        own, peer, roof = rows["auto"], rows["hf-eager"], rows["roof"]
        assert own["status"] == "ok"
        assert set(own["errors"]) == {"output", "hidden", "gate", "gate_up", "down"}
        assert own["saved_bytes"] > 0
        assert own["tflops"] == pytest.approx(one["flops"] / own["time_s"]["p50"] / 1e12)
        pairs = list(zip(peer["times_s"], own["times_s"], roof["times_s"], strict=True))
        assert sum(None not in pair for pair in pairs) >= 3
        expected = [p / o for p, o, _ in pairs if p is not None and o is not None]
        assert one["speedups"]["hf-eager"]["p50"] == pytest.approx(
            torch.tensor(expected).quantile(0.5).item(), rel=1e-5
        )
        share = [r / o for _, o, r in pairs if r is not None and o is not None]
        assert own["of"]["roof"]["p50"] == pytest.approx(statistics.median(share))
        assert "auto" not in one["speedups"]

    png = chart.read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(png) > 10_000
    lines = table.read_text().splitlines()
    assert len([line for line in lines if line.startswith("| T=40")]) == 6
    assert len({line.count("|") for line in lines[:8]}) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.json", "b.md", "b.png"]  # no temporary file stays


def spoiled(spoil):
    def build(workload):
        good = PROVIDERS["torch"].build(workload)
        return type(good)(
            forward=lambda x: spoil(good.forward(x)), choose=good.choose, parameters=good.parameters, label="spoiled"
        )

    return Provider(label="spoiled", build=build)


def test_a_wrong_result_is_flagged_and_fails_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(PROVIDERS, "hf-eager", spoiled(lambda out: out * 0))
    json_file = tmp_path / "b.json"
    done = run(*SHAPE, *QUICK, "--mode", "forward", "--providers", "auto,hf-eager", "--json", str(json_file))
    assert done.exit_code == EXIT_FAULT
    assert "MISMATCH 1e+00" in done.stdout
    assert "spoiled: mismatch: output 1.0e+00" in done.stderr
    own, wrong = json.loads(json_file.read_text())["runs"][0]["rows"][:2]
    assert (own["status"], wrong["status"]) == ("ok", "mismatch")
    assert wrong["times_s"] == []
    assert own["times_s"]


def test_a_provider_that_breaks_is_shown_and_fails_the_command(monkeypatch):
    def explode(out):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(PROVIDERS, "hf-eager", spoiled(explode))
    done = run(*SHAPE, *QUICK, "--mode", "forward", "--providers", "auto,hf-eager")
    assert done.exit_code == EXIT_FAULT
    assert "RuntimeError: no such kernel" in done.stderr


def test_peers_that_are_not_installed_are_no_error(monkeypatch):
    from moe_triton.benchmarking.providers import huggingface

    def missing(package):
        raise Unavailable("not installed", f"{package} is not installed")

    monkeypatch.setattr(huggingface, "require", missing)
    done = run(*SHAPE, *QUICK, "--mode", "forward")
    assert done.exit_code == 0, done.output
    (line,) = (line for line in done.stdout.splitlines() if line.strip().startswith("not installed: "))
    for label in ("transformers eager", "ScatterMoE", "Liger-Kernel", "SonicMoE", "MegaBlocks", "triton_kernels"):
        assert label in line
    assert "moe_triton (torch)" in done.stdout


@pytest.mark.parametrize("arguments", [["--preset", "sonic-12"], ["--device", "cuda:0", *SHAPE]], ids=str)
def test_without_a_gpu(arguments, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    done = run(*arguments)
    assert done.exit_code == EXIT_NO_GPU
    assert "not measured on this machine" in done.stderr
    assert "needs a GPU" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "gpu"], "suite: got 'gpu', wanted one of"),
        (["--preset", "cpu", "--tokens", "4"], "suite: got 'cpu' together with tokens"),
        (["--tokens", "4", "--hidden", "8"], "intermediate, experts, top_k: missing"),
        ([*SHAPE, "--top-k", "9"], "top_k: got 9, wanted 1 to 8"),
        ([*SHAPE, "--dtype", "int8"], "dtype: got 'int8', wanted one of float32"),
        ([*SHAPE, "--dtype", ","], "dtype: got ','"),
        ([*SHAPE, "--skew", "odd"], "skew: got 'odd'"),
        ([*SHAPE, "--mode", "sideways"], "mode: got 'sideways', wanted one of forward"),
        ([*SHAPE, "--how", "fast"], "how: got 'fast', wanted one of eager"),
        ([*SHAPE, "--cache", "luke"], "cache: got 'luke', wanted one of cold"),
        ([*SHAPE, "--fail-over", "much"], "fail-over: got 'much', wanted a percentage"),
        ([*SHAPE, "--compare", "no.json"], "--compare: cannot read no.json"),
        ([*SHAPE, "--report", "/proc/no"], "--report: cannot write to /proc/no"),
        ([*SHAPE, "--providers", "auto,tutel"], "providers: got 'tutel', wanted one of auto"),
        ([*SHAPE, "--device", "abacus"], "device: got 'abacus'"),
        ([*SHAPE, "--device", "meta"], "device: got 'meta'"),
        ([*SHAPE, "--budget", "-1"], "budget: got -1.0, wanted seconds >= 0"),
        ([*SHAPE, "--budget", "nan"], "budget: got nan"),
        ([*SHAPE, "--threads", "0"], "threads: got 0, wanted at least 1"),
        ([*SHAPE, "--seed", "-1"], "seed: got -1"),
        ([*SHAPE, "--json", "no/such/place.json"], "--json: no directory no/such"),
        ([*SHAPE, "--chart", "/"], "--chart: / is a directory"),
    ],
    ids=str,
)
def test_bad_arguments_are_named_before_anything_is_measured(arguments, message, monkeypatch):
    monkeypatch.setattr(runner, "measure_case", lambda *a, **_: pytest.fail("something was measured"))
    done = run("--device", "cpu", *arguments)
    assert done.exit_code == EXIT_USAGE
    assert message in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("float32",)], ids=str)
def test_the_default_is_the_cpu_preset_in_the_dtypes_that_the_processor_has(monkeypatch, dtypes):
    seen = []
    monkeypatch.setattr(runner, "measure_case", lambda case, **_: seen.append((case.name, case.dtype)) or [])
    monkeypatch.setattr(limits, "onednn_dtypes", lambda: tuple(getattr(torch, dtype) for dtype in dtypes))
    done = run("--device", "cpu")
    assert done.exit_code == 0
    assert seen == [(f"cpu-{n}", d) for n in ("fine", "coarse", "decode") for d in dtypes]
    assert ("bfloat16 is left out: this processor has no fast product" in done.stderr) == (len(dtypes) == 1)


def test_options_override_a_preset(monkeypatch):
    seen = []
    monkeypatch.setattr(runner, "measure_case", lambda case, **_: seen.append(case) or [])
    assert run("--device", "cpu", "--preset", "cpu-fine", "--dtype", "bfloat16", "--skew", "zipf").exit_code == 0
    assert [(case.tokens, case.dtype, case.skew) for case in seen] == [(2048, "bfloat16", "zipf")]


def test_list_names_everything():
    done = run("--list")
    assert done.exit_code == 0
    for name in ("cpu", "sonic-12", "decode", "hf-grouped_mm", "deepspeed", "needs a GPU"):
        assert name in done.stdout


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    from moe_triton.benchmarking import report

    path = tmp_path / "b.json"
    path.write_text("old")

    def full_disk(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        report.write_json(path, {})
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["b.json"]


def test_the_commit_is_that_of_the_source(monkeypatch):
    answers = {"ls-files": "environment.py", "rev-parse": "ab" * 20, "status": " M a.py"}

    class Done:
        def __init__(self, text):
            self.stdout = text + "\n"

    monkeypatch.setattr(environment.subprocess, "run", lambda command, **_: Done(answers[command[4]]))
    assert environment.commit() == {"hash": "ab" * 20, "dirty": True}
    answers["status"] = ""
    assert environment.commit() == {"hash": "ab" * 20, "dirty": False}

    def untracked(command, **_):
        raise environment.subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(environment.subprocess, "run", untracked)
    assert environment.commit() is None


def test_a_report_without_matplotlib_has_no_png(tmp_path, monkeypatch):
    real = runtime.installed_version
    monkeypatch.setattr(runtime, "installed_version", lambda name: None if name == "matplotlib" else real(name))
    done = run(*SHAPE, *QUICK, "--mode", "forward", "--providers", "auto", "--report", str(tmp_path / "report"))
    assert done.exit_code == 0, done.output
    assert "no PNG charts, which need matplotlib: moe-triton[plot]" in " ".join(done.stdout.split())
    assert {path.name for path in (tmp_path / "report").iterdir()} >= {"report.html", "results.csv", "results.json"}
    assert not list((tmp_path / "report").glob("*.png"))


def test_formats(tmp_path):
    shape = ["--tokens", "4", "--hidden", "64", "--intermediate", "32", "--experts", "4", "--top-k", "2"]
    file = tmp_path / "b.json"
    done = run(
        *shape, *QUICK, "--dtype", "float32", "--format", "mxfp4,int4", "--providers", "auto", "--stages", "--json",
        str(file),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "moe_triton (torch, int4)" in done.stdout
    runs = json.loads(file.read_text())["runs"]
    assert [(one["case"]["format"], one["mode"]) for one in runs] == [("mxfp4", "forward"), ("int4", "forward")]
    tables = json.loads(file.read_text())["stages"]
    assert [table["case"]["format"] for table in tables] == ["mxfp4", "int4"]
    packed = [next(row for row in table["stages"] if row["name"] == "experts")["bytes"] for table in tables]
    assert packed[1] - packed[0] == (5 - 4.25) / 8 * 3 * 4 * 64 * 32
    refused = run(*shape, *QUICK, "--format", "mxfp4", "--mode", "full")
    assert refused.exit_code == EXIT_USAGE
    assert "format: got it with mode 'full', wanted forward" in refused.stderr
