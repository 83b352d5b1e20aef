"""moe-triton info, and which backend runs where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from typer.testing import CliRunner

import moe_triton
from moe_triton import cli, runtime
from moe_triton.backends.torch.fused import loops_in_words
from moe_triton.cli import app
from moe_triton.cli.info import tables_line


def test_info_json():
    result = CliRunner().invoke(app, ["info", "--json"])
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["versions"]["torch"] == version("torch")
    assert facts["versions"]["moe-triton"] == moe_triton.__version__
    cpu = {path["dtype"]: path for path in facts["backends"] if path["device"] == "cpu"}
    assert set(cpu) == {"bfloat16", "float16", "float32", "float64"}
    assert all(path["backend"] == "torch" and path["reason"] for path in cpu.values())
    assert facts["exchanges"]["DeepEP"] == "the package deep_ep is not installed"
    assert next(iter(facts["exchanges"].values())) is None
    assert facts["cpu_loops"] == loops_in_words()


def test_info_table_and_module_entry():
    done = subprocess.run([sys.executable, "-m", "moe_triton", "info"], capture_output=True, text=True, check=True)
    for word in (
        "torch",
        "triton",
        "cpu",
        "bfloat16",
        "backend",
        "Compiled loops on the CPU: ",
        "DeepEP: the package deep_ep is not installed",
    ):
        assert word in done.stdout
    assert "\x1b" not in done.stdout  # plain text when it is not a terminal


def test_choice_of_backend(monkeypatch):
    cpu = torch.device("cpu")
    assert runtime.choose("auto", cpu, torch.float32).name == "torch"
    assert "GPU" in runtime.choose("auto", cpu, torch.float32).reason
    assert runtime.choose("triton", cpu, torch.float32).name == "triton"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend: got 'triton', but the Triton kernels need a CUDA or ROCm GPU"):
        runtime.choose("triton", cpu, torch.float32)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        moe_triton.MoE(8, 4, 4, backend="triton")(torch.randn(2, 8))
    with pytest.raises(TypeError, match="float64"):
        runtime.choose("triton", cpu, torch.float64)
    with pytest.raises(ValueError, match="backend: got 'tpu'"):
        runtime.choose("tpu", cpu, torch.float32)
    monkeypatch.setattr(runtime, "TRITON_INSTALLED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert runtime.choose("auto", torch.device("cuda", 0), torch.bfloat16) == ("torch", "Triton is not installed")
    monkeypatch.setattr(runtime, "TRITON_INSTALLED", True)
    assert runtime.choose("auto", torch.device("cuda", 0), torch.bfloat16).name == "triton"
    assert runtime.choose("auto", torch.device("cuda", 0), torch.float64).name == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    runtime._unfit_capability.cache_clear()
    assert "8.0; the GPU has 7.5" in runtime.choose("auto", torch.device("cuda", 0), torch.bfloat16).reason


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(table, *words)` runs a command with this table of the user's: its exit code, stdout and stderr."""
    from moe_triton_kernels import configs

    def run_command(table, *words):
        monkeypatch.setenv("MOE_TRITON_TABLE", str(table))
        monkeypatch.setattr(sys, "argv", ["moe-triton", *words])
        monkeypatch.setattr(sys, "stdout", sys.stdout)  # which `main` replaces
        configs.user_table.cache_clear()
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    yield run_command
    configs.user_table.cache_clear()


@pytest.mark.skipif(not runtime.TRITON_INSTALLED, reason="the tables come with the kernels")
@pytest.mark.parametrize("contents", [b"{broken", b"\xff", b'[{"op": "up"}]', None])
def test_a_broken_table_is_one_line_after_everything_else(tmp_path, run, contents):
    table = tmp_path / "configs.json"
    table.mkdir() if contents is None else table.write_bytes(contents)
    code, out, err = run(table, "info", "--json")
    assert code == 1
    assert err.startswith(f"moe-triton info: kernel configurations: table {table}: ")
    assert err.count("\n") == 1
    facts = json.loads(out)
    assert facts["tables"] == {"error": err.strip().removeprefix("moe-triton info: kernel configurations: ")}
    assert facts["backends"]


@pytest.mark.skipif(not runtime.TRITON_INSTALLED, reason="the tables come with the kernels")
@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "--kernel", "up_gated"],
        ["profile", "--backend", "triton", "--model", "cpu-decode"],
        ["train", "--backend", "triton"],
        ["tune", "--dry-run", "--tokens=8", "--hidden=16", "--intermediate=16", "--experts=2", "--top-k=1", "--ops=up"],
    ],
    ids=lambda words: words[0],
)
def test_no_command_begins_with_a_broken_table(tmp_path, run, words):
    table = tmp_path / "configs.json"
    table.write_text("{broken")
    out = ["--out", str(tmp_path / "out")] if words[0] in ("profile", "train") else []
    code, printed, said = run(table, *words, *out)
    assert (code, printed) == (2, "")
    assert f"table {table}: " in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not runtime.TRITON_INSTALLED, reason="the tables come with the kernels")
def test_warp_specialized_entries_are_counted():
    facts = {"architectures": ["sm_90"], "user_table": "t.json", "user_entries": 3, "shipped_entries": 0}
    facts["cluster_error"] = None
    line = tables_line({**facts, "gluon_entries": 2, "gluon_error": None})
    assert "3 entries in the user's table (t.json)" in line
    assert line.endswith("Warp-specialized kernels (Gluon) run in 2 of them.")
    line = tables_line({**facts, "gluon_entries": 2, "gluon_error": None, "cluster_error": "old Triton"})
    assert line.endswith("(Gluon) run in 2 of them. None of them in clusters: old Triton.")
    line = tables_line({**facts, "gluon_entries": 2, "gluon_error": "ImportError: no tma"})
    assert line.endswith("Warp-specialized kernels (Gluon) cannot run: ImportError: no tma.")


def test_version_and_short_help():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"moe-triton {moe_triton.__version__}\n")
    for words in (["-h"], ["train", "-h"]):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0
        assert "Usage" in result.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "moe_triton", "info"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "moe-triton: [Errno 28] No space left on device\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "moe-triton: out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), "moe-triton: CUDA out of memory."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "moe-triton: DefaultCPUAllocator"),
        (RuntimeError("a fault of ours"), None),
    ],
)
def test_too_little_memory_is_one_line(monkeypatch, capsys, error, line):
    def fail():
        raise error

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which `main` replaces
    if line is None:  # a traceback is what a report of it needs
        with pytest.raises(RuntimeError, match="a fault of ours"):
            cli.main()
        return
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    found = capsys.readouterr().err
    assert found.startswith(line)
    assert found.count("\n") == 1
