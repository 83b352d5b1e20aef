"""The policy of a processor: what it is made from, and what follows from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_triton.backends.torch.cpu import CpuPolicy, this_cpu


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


@pytest.mark.parametrize("avx512", [False, True])
@pytest.mark.parametrize("onednn", [False, True])
def test_the_policy_of_a_processor(avx512: bool, onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512" if avx512 else "AVX2")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    policy = this_cpu.__wrapped__()
    assert policy.shapes_recur == (avx512 and onednn)
    assert set(policy.linear) == ({torch.float32} if avx512 and onednn else set())
    with_batches = {torch.bfloat16} if onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported() else set()
    with_batches |= {torch.float32} if torch.backends.mkl.is_available() and not avx512 else set()
    assert set(policy.most_batched_rows) == with_batches
