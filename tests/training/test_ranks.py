"""`moe-triton train` under torchrun: the losses of one process, and checkpoints that any number of them go on from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_triton.cli import app
from tests.helpers.commands import run_command, start_commands

STEPS = 40
TINY = [
    *("--batch-size", "8", "--seq-len", "16", "--num-layers", "2", "--hidden-size", "16", "--intermediate-size", "8"),
    *("--num-experts", "7", "--steps", str(STEPS), "--capacity-factor", "1.0"),
    *("--dtype", "float64"),  # in float32 rounding would turn a near-tie of the router in some step
]


def arguments(out: Path, text: Path, *options: str) -> list[str]:
    return ["train", "--out", str(out), "--data", str(text), *TINY, *options]


def torchrun(processes: int, words: list[str]) -> str:
    """Runs `moe-triton` to the end; what was printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*launcher, "-m", "moe_triton", *words],
        capture_output=True, text=True, check=False, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def train_and_kill(out: Path, text: Path, *options: str, processes: int, after: int) -> int:
    """SIGKILL to all processes at once when `after` steps are on disk; the number of steps that were then."""
    words = arguments(out, text, "--checkpoint-every", "2", *options)
    running = start_commands(words, out.with_name("printed"), processes)
    deadline = time.monotonic() + 300
    try:
        while len(losses(out)) < after:
            assert all(process.is_alive() for process in running), "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.join()
    return len(losses(out))


def losses(out: Path) -> list[float]:
    path = out / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line)["train_loss"] for line in lines]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} is followed by {i + 1}, and {i * i} is its square.\n" for i in range(1000)))
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text) -> Path:
    out = tmp_path_factory.mktemp("run") / "alone"
    run_command(arguments(out, text), out.with_name("printed"))
    return out


def test_killed_on_four_processes_resumed_on_two_then_on_one(tmp_path, text, alone):
    out = tmp_path / "run"
    first = train_and_kill(out, text, "--ep", "4", "--ep-chunks", "2", processes=4, after=4)
    assert first < STEPS
    second = train_and_kill(out, text, "--ep", "2", "--resume", processes=2, after=first + 4)
    assert second < STEPS
    printed = run_command(arguments(out, text, "--resume"), tmp_path / "printed at last")
    assert "going on after step" in printed
    assert losses(out) == pytest.approx(losses(alone), rel=1e-12)


def test_every_process_counts_the_same(tmp_path, text, alone):
    out = tmp_path / "run"
    printed = torchrun(2, arguments(out, text, "--ep", "2", "--ep-mode", "capacity"))
    assert printed.count("held-out loss:") == 1, "one process speaks for all"
    assert losses(out) == pytest.approx(losses(alone), rel=1e-12)
    summary, wanted = (json.loads((folder / "summary.json").read_text()) for folder in (out, alone))
    assert (summary["processes"], summary["ep"]) == (2, 2)
    for key in ("held_out_loss", "validation_loss", "parameters", "active_parameters", "dropped", "tokens"):
        assert summary["moe"][key] == pytest.approx(wanted["moe"][key], rel=1e-9), key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ep", "2"], "--ep: got 2, wanted a divisor of the 1 processes; start it with torchrun"),
        (["--ep", "0"], "--ep: got 0"),
    ],
)
def test_bad_sizes(tmp_path, text, options, message):
    done = CliRunner().invoke(app, arguments(tmp_path / "run", text, *options))
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "run").exists()
