"""moe-triton info, and which backend runs where."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from typer.testing import CliRunner

import moe_triton
from moe_triton import runtime
from moe_triton.cli import app


def test_info_json():
    result = CliRunner().invoke(app, ["info", "--json"])
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["versions"]["torch"] == version("torch")
    assert facts["versions"]["moe-triton"] == moe_triton.__version__
    cpu = {path["dtype"]: path for path in facts["backends"] if path["device"] == "cpu"}
    assert set(cpu) == {"bfloat16", "float16", "float32", "float64"}
    assert all(path["backend"] == "torch" and path["reason"] for path in cpu.values())


def test_info_table_and_module_entry():
    done = subprocess.run([sys.executable, "-m", "moe_triton", "info"], capture_output=True, text=True, check=True)
    for word in ("torch", "triton", "cpu", "bfloat16", "backend"):
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
    assert "8.0; the GPU has 7.5" in runtime.choose("auto", torch.device("cuda", 0), torch.bfloat16).reason
