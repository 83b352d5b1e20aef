"""The policy of a processor: what it is made from, and what follows from it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_triton.backends.torch import cpu, fused
from moe_triton.backends.torch.cpu import CpuPolicy
from moe_triton.backends.torch.processor import Processor
from tests.helpers.problems import check, make_problem, ragged_choices, run, with_policy


@pytest.mark.parametrize(("recurring", "threads", "expected"), [(False, 1, 0), (False, 2, 320), (True, 1, 320)])
def test_batches_need_threads(recurring: bool, threads: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = CpuPolicy(shapes_recur=recurring, most_batched_rows={torch.float32: (320, 48)})
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for asked in (policy, replace(policy, num_threads=threads)):
        assert asked.most_batched(torch.float32, backward=False) == expected
        assert asked.most_batched(torch.float64, backward=False) == 0


@pytest.mark.parametrize("recurring", [False, True])
def test_padded_sizes_recur(recurring: bool) -> None:
    policy = CpuPolicy(shapes_recur=recurring)
    found = [policy.padded(m) for m in (0, 1, 16, 17, 32, 33)]
    assert found == ([0, 1, 16, 32, 32, 48] if recurring else [0, 1, 16, 17, 32, 33])
    assert policy.padded(3, batched=True) == (16 if recurring else 3)
    if recurring:
        assert len({policy.padded(m) for m in range(200, 300)}) <= 8


def processor(maker: str, *instruction_sets: str) -> Processor:
    return Processor(maker, "some processor", instruction_sets)


KINDS = {
    "zen 5": (processor("AMD", "avx2", "avx512", "avx512_bf16")._replace(family=26), "onednn", "measured"),
    "zen 4": (processor("AMD", "avx2", "avx512", "avx512_bf16")._replace(family=25), "loops", "measured"),
    "zen 3": (processor("AMD", "avx2"), "mkl", "measured"),
    "skylake": (processor("Intel", "avx2", "avx512"), "mkl", "measured"),
    "sapphire rapids": (processor("Intel", "avx2", "avx512", "avx512_bf16", "amx_bf16"), "mkl", "measured"),
    "haswell": (processor("Intel", "avx2"), "mkl", "guess"),
    "unknown, AVX-512": (processor("unknown", "avx2", "avx512"), "mkl", "guess"),
    "graviton": (processor("Arm", "neon", "bf16", "sve"), "mm", "guess"),
    "unknown": (processor("unknown"), "mm", "guess"),
}


@pytest.fixture
def no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where a tuned policy would be read from; there is none yet."""
    monkeypatch.delenv(cpu.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "moe_triton" / "cpu.json"


@pytest.mark.parametrize("kind", KINDS)
def test_the_table(kind: str, no_files: Path) -> None:
    where, policy, evidence = KINDS[kind]
    chosen = cpu.choose_policy(where)
    assert chosen.policy == policy
    assert evidence in chosen.reason


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("mkl", [False, True])
@pytest.mark.parametrize("name", cpu.POLICIES)
def test_what_a_policy_is(name: str, mkl: bool, onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    for where, has_bf16 in ((KINDS["zen 4"][0], True), (KINDS["skylake"][0], False), (KINDS["graviton"][0], True)):
        policy = cpu.make_policy(name, where)
        assert policy.shapes_recur == (name.startswith(("onednn", "loops")) and onednn)
        assert set(policy.linear) == ({torch.float32} if policy.shapes_recur else set())
        batched = {torch.float32} if name == "mkl" and mkl else set()
        assert set(policy.most_batched_rows) == batched | ({torch.bfloat16} if has_bf16 and onednn else set())
        has_loops = name == "loops" and where.has("avx512")
        looped = {torch.float32, *([torch.bfloat16] if where.has("avx512_bf16") else [])} if has_loops else set()
        assert policy.looped == looped


def test_the_policies_without_loops(no_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = KINDS["zen 4"][0]
    monkeypatch.setenv(fused.VARIABLE, "0")
    assert cpu.choose_policy(where).policy == "onednn_large"
    assert not cpu.make_policy("loops", where).looped
    monkeypatch.setenv(fused.VARIABLE, "1")
    policy = cpu.make_policy("loops", where)
    assert policy.loops(torch.float32)
    assert policy.loops(torch.bfloat16)
    monkeypatch.setenv(fused.VARIABLE, "0")
    assert not policy.loops(torch.float32)


def test_pairs_where_numba_compiles_for_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    numba, where = pytest.importorskip("numba"), KINDS["zen 4"][0]
    monkeypatch.setenv(fused.VARIABLE, "1")
    assert fused.multiplies_pairs(where)
    assert not fused.multiplies_pairs(KINDS["skylake"][0])
    monkeypatch.setattr(numba.config, "CPU_NAME", "skylake-avx512")
    assert not fused.multiplies_pairs(where)
    assert set(cpu.make_policy("loops", where).looped) == {torch.float32}


def test_the_environment_overrides(no_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = KINDS["zen 3"][0]
    monkeypatch.setenv(cpu.VARIABLE, "onednn")
    assert cpu.choose_policy(where) == cpu.Chosen("onednn", "MOE_TRITON_CPU_POLICY asks for it")
    monkeypatch.setenv(cpu.VARIABLE, "openblas")
    wanted = f"MOE_TRITON_CPU_POLICY: got 'openblas', wanted {', '.join(cpu.POLICIES)} or the path"
    with pytest.raises(ValueError, match=wanted):
        cpu.choose_policy(where)


@pytest.mark.parametrize("named", [False, True])
def test_a_tuned_policy(named: bool, no_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, path = KINDS["zen 3"][0], tmp_path / "other.json" if named else no_files
    if named:
        monkeypatch.setenv(cpu.VARIABLE, str(path))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({cpu.policy_key(where): {"policy": "mm"}}), encoding="utf-8")
    chosen = cpu.choose_policy(where)
    assert chosen.policy == "mm"
    assert str(path) in chosen.reason
    assert cpu.choose_policy(KINDS["skylake"][0]).policy == "mkl"  # measured on another processor
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert cpu.choose_policy(where).policy == "mkl"  # and with other threads


@pytest.mark.parametrize("text", ["{", "[1]", '{"key": {}}', '{"key": {"policy": "fast"}}'])
def test_a_broken_file_is_named(text: str, no_files: Path) -> None:
    no_files.parent.mkdir()
    no_files.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(str(no_files))):
        cpu.choose_policy(KINDS["zen 3"][0])


def test_policies_agree(no_files: Path) -> None:
    """One layer's results by every policy of every kind of processor."""
    problem = make_problem(ragged_choices((3, 0, 40, 17)), 4, bias=True, device="cpu")
    for where, _, _ in KINDS.values():
        for name in cpu.POLICIES:
            policy = cpu.make_policy(name, where)
            for least in ({}, {"linear_from": 1}, {"linear_from": 1, "gradient_from": 1}):
                check(run(problem, with_policy(replace(policy, **least))), problem)


def test_gradients_of_small_projections_are_made_by_torch() -> None:
    used: list[int] = []

    def linear(left: torch.Tensor, right: torch.Tensor, *_: object) -> torch.Tensor:
        used.append(len(left) * len(right))
        return left @ right.T

    policy = CpuPolicy(shapes_recur=True, linear={torch.float32: linear}, linear_from=1, gradient_from=12)
    left, right = torch.randn(5, 4), torch.randn(5, 3)
    for columns in (3, 2):
        out = torch.full((4, columns), torch.nan)
        policy.gradient(left, right[:, :columns], out)
        torch.testing.assert_close(out, left.T @ right[:, :columns])
    assert used == [12]


def test_small_products_are_made_by_torch() -> None:
    used: list[int] = []
    policy = CpuPolicy(
        shapes_recur=True, linear={torch.float32: lambda x, *_: used.append(len(x)) or x}, linear_from=64
    )
    weight = torch.ones(4, 4)
    for rows in (0, 1, 2, 3):
        policy.product(torch.ones(rows, 4), weight)
    assert used == [2, 3]
