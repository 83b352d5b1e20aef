"""`moe-triton simulate` as a user runs it: the table, the chart, the JSON, the exit codes and the messages."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from moe_triton.benchmarking.cases import PRESETS
from moe_triton.cli import app
from moe_triton.simulate.cost_model import Workload, predict
from moe_triton.simulate.presets import DEVICES, MODELS, NETWORKS
from moe_triton_kernels.tools import floors


def run(*arguments: str):
    return CliRunner().invoke(app, ["simulate", *arguments])


def test_table_and_text_chart():
    done = subprocess.run(
        [sys.executable, "-m", "moe_triton", "simulate", "--preset", "deepseek-v3"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "\x1b" not in done.stdout  # plain text when it is not a terminal
    assert "Predictions of a cost model, not measurements" in done.stdout
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[:2] == [
        "This model cannot know this package's speed on GPUs, or NCCL's beyond one node.",
        "Predictions of a cost model, not measurements.",
    ]
    assert "deepseek-v3 on h100, nvlink4-ib400: train, 4096 tokens per GPU" in lines[2]
    assert "nccl exchange in bfloat16" in " ".join(lines[2:4])
    headings = next(i for i, line in enumerate(lines) if line.split()[:2] == ["GPUs", "EP"])
    rows = [line.split() for line in lines[headings + 1 : headings + 14]]
    assert [int(row[0]) for row in rows] == [2**power for power in range(13)]
    assert rows[0][1:3] == ["1", "1"]
    assert rows[-1][1:3] == ["256", "16"]
    # what is printed is what the model says
    last = predict(Workload(model=MODELS["deepseek-v3"]), DEVICES["h100"], NETWORKS["nvlink4-ib400"], 4096)
    alone = predict(Workload(model=MODELS["deepseek-v3"]), DEVICES["h100"], NETWORKS["nvlink4-ib400"], 1)
    assert float(rows[-1][10]) == pytest.approx(last.tokens_per_s_per_gpu, abs=0.5)
    assert float(rows[-1][11]) == pytest.approx(last.tokens_per_s_per_gpu / alone.tokens_per_s_per_gpu, abs=0.005)
    bars = [line.split() for line in lines[-15:-2]]
    assert [int(bar[0]) for bar in bars] == [2**power for power in range(13)]
    longest = max(bars, key=lambda bar: float(bar[2]))
    assert len(longest[1]) == 60
    assert set("".join(bar[1] for bar in bars)) == {"d", "e", "x"}


def test_json():
    options = ["--preset", "qwen3-30b-a3b", "--device", "b200", "--network", "nvl72-ib400", "--gpus", "64,8,8", "--ep"]
    options += ["8", "--tokens", "1000", "--chunks", "4", "--dispatch-dtype", "float8", "--skew", "1.5"]
    done = run(*options, "--mode", "forward", "--exchange", "nccl", "--dtype", "float8", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["schema"] == "moe-triton-simulate/1"
    assert "not measurements" in found["note"]
    assert found["device"]["name"] == "b200"
    assert found["network"]["gpus_per_node"] == 72
    work = Workload(
        model=MODELS["qwen3-30b-a3b"],
        tokens=1000,
        chunks=4,
        dtype="float8",
        dispatch_dtype="float8",
        skew=1.5,
        mode="forward",
        exchange="nccl",
    )
    assert found["workload"]["chunks"] == 4
    assert [(row["gpus"], row["ep"], row["edp"]) for row in found["predictions"]] == [(8, 8, 1), (64, 8, 8)]
    for row in found["predictions"]:
        one = predict(work, DEVICES["b200"], NETWORKS["nvl72-ib400"], row["gpus"], 8)
        assert row["step_s"] == pytest.approx(one.step_s)
        assert row["overlap"] == pytest.approx(one.overlap)


def test_chart(tmp_path):
    chart = tmp_path / "s.png"
    done = run("--preset", "olmoe", "--chart", str(chart))
    assert done.exit_code == 0, done.output
    png = chart.read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(png) > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["s.png"]  # no temporary file stays


def test_what_does_not_fit_is_marked():
    assert "!: the parameters, gradients and Adam's states exceed the 80 GB of a GPU." in run("--gpus", "8").stdout
    assert "!" not in run("--preset", "olmoe", "--gpus", "8", "--mode", "forward").stdout


def test_validate():
    done = run("--validate")
    assert done.exit_code == 0, done.output
    assert "DeepEP low-latency combine" in done.stdout
    assert "Largest error where nothing was fitted" in done.stdout
    found = json.loads(run("--validate", "--json").stdout)
    assert len(found["points"]) == 76
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert found["worst_error"]["DeepEP low-latency combine"] == pytest.approx(0.093, abs=0.002)


def test_names_mean_the_same_in_every_command():
    """Devices and layers are those of `inspect`, `profile` and `bench`; the beginning of a model's name is enough."""
    assert set(DEVICES) < set(floors.DEVICES)  # those with a usual network
    for case in PRESETS["models"].cases:
        model = MODELS[case.name.lower()]
        assert all(
            getattr(model, size) == getattr(case, size) for size in ("hidden", "intermediate", "experts", "top_k")
        )
    short = run("--model", "Qwen3-235B", "--gpus", "8", "--device", "H200")
    assert short.exit_code == 0
    assert short.stdout == run("--preset", "qwen3-235b-a22b", "--gpus", "8", "--device", "h200").stdout


def test_list():
    done = run("--list")
    assert done.exit_code == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    for name in (*MODELS, *DEVICES, *NETWORKS):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt-oss"], "preset: got 'gpt-oss', wanted one of gpt-oss-20b, gpt-oss-120b"),
        (["--preset", "gpt-5"], "preset: got 'gpt-5', wanted one of deepseek-v3"),
        (["--device", "tpu"], "device: got 'tpu', wanted one of a100"),
        (["--network", "carrier-pigeon"], "network: got 'carrier-pigeon', wanted one of"),
        (["--gpus", "0"], "gpus: got '0', wanted numbers from 1 to 4096"),
        (["--gpus", "8,4097"], "gpus: got '8,4097'"),
        (["--gpus", "many"], "gpus: got 'many'"),
        (["--gpus", ","], "gpus: got ','"),
        (["--ep", "3"], "ep: got 3, wanted a divisor of the 256 experts"),
        (["--gpus", "48", "--ep", "32"], "ep: got 32, wanted a divisor or a multiple of 48 GPUs"),
        (["--tokens", "0"], "tokens: got 0"),
        (["--skew", "nan"], "skew: got nan"),
        (["--chunks", "-1"], "chunks: got -1"),
        (["--mode", "backward"], "mode: got 'backward'"),
        (["--device", "a100", "--dtype", "float8"], "dtype: got 'float8', wanted one of bfloat16, float16 on a100"),
        (["--chart", "/nowhere/at/all.png"], "--chart: no directory /nowhere/at"),
        (["--chart", "/proc/s.png"], "--chart: cannot write to /proc: "),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2
    assert len(done.output.strip().splitlines()) == 1
    assert message in done.output
