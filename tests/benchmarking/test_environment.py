"""What is recorded beside a result."""

from __future__ import annotations

import pytest
import torch

from moe_triton.benchmarking import environment
from moe_triton_kernels import compiler, launch


def test_every_result_of_a_gpu_names_its_assembler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        environment, "devices", lambda: [{"device": "cpu", "name": "c"}, {"device": "cuda:0", "name": "g"}]
    )
    monkeypatch.setattr(compiler, "ptxas_version", lambda architecture: f"12.8 for {architecture}")
    monkeypatch.setattr(launch, "target_of", lambda device: launch.Target(architecture="sm_90", num_sms=132))
    on_gpu, on_cpu = (environment.environment(torch.device(name)) for name in ("cuda", "cpu"))
    assert on_gpu["versions"]["ptxas"] == "12.8 for sm_90"
    assert "ptxas 12.8" in environment.caption(on_gpu)
    assert "ptxas" not in on_cpu["versions"]
    assert "ptxas" not in environment.caption(on_cpu)
