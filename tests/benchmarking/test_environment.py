"""What is recorded beside a result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_triton.benchmarking import environment


def test_the_assembler_is_the_one_in_use_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile exchanges it within a process, by this variable."""
    shipped = environment.ptxas_version()
    assert shipped is None or shipped.count(".") == 1
    other = tmp_path / "ptxas"
    other.write_text('#!/bin/sh\necho "Cuda compilation tools, release 99.7, V99.7.1"\n')
    other.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(other))
    assert environment.ptxas_version() == "99.7"


def test_every_result_of_a_gpu_names_its_assembler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        environment, "devices", lambda: [{"device": "cpu", "name": "c"}, {"device": "cuda:0", "name": "g"}]
    )
    monkeypatch.setattr(environment, "ptxas_version", lambda: "12.8")
    on_gpu, on_cpu = (environment.environment(torch.device(name)) for name in ("cuda", "cpu"))
    assert on_gpu["versions"]["ptxas"] == "12.8"
    assert "ptxas 12.8" in environment.caption(on_gpu)
    assert on_cpu["versions"]["ptxas"] is None
    assert "ptxas" not in environment.caption(on_cpu)
