"""Products of several experts in one call have the bits of one call for each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_triton.backends.torch import experts_cpu, products
from moe_triton.backends.torch.cpu import CpuPolicy, is_aligned
from moe_triton.records import ExpertSpec
from tests.helpers.problems import make_problem, ragged_choices, run, with_policy

SIZES = {"all": [3, 1, 17, 5, 2], "some": [0, 4, 0, 2, 30, 0], "few": [0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 1]}
POLICY = CpuPolicy(shapes_recur=False, num_threads=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_one_call_for_all_has_the_bits_of_one_for_each(monkeypatch, sizes, is_transposed, dtype):
    torch.manual_seed(0)
    spec = ExpertSpec(is_transposed=is_transposed)
    problem = make_problem(
        ragged_choices(SIZES[sizes]), len(SIZES[sizes]), spec=spec, bias=False, d=16, n=24, dtype=dtype
    )
    calls = []
    in_one_call = products._in_one_call
    monkeypatch.setattr(products, "_in_one_call", lambda *args: calls.append(in_one_call(*args)) or calls[-1])
    found = run(problem, with_policy(POLICY))
    made = [call is not None for call in calls]
    assert made == [sizes != "few"] * 4  # up and down, forward and backward
    monkeypatch.setattr(experts_cpu, "GROUPED_DTYPES", ())
    one_by_one = run(problem, with_policy(POLICY))
    assert len(calls) == 4
    assert found.keys() == one_by_one.keys()
    for name, value in found.items():
        assert torch.equal(value, one_by_one[name]), name


def test_later_blocks_count_their_rows_from_their_first():
    problem = make_problem(ragged_choices([7, 9, 8, 6, 3, 11]), 6, bias=False, d=16, n=24)
    whole, cut = (run(problem, with_policy(replace(POLICY, shared_block_rows=rows))) for rows in (256, 20))
    for name, value in whole.items():
        assert torch.equal(value, cut[name]), name


@pytest.mark.parametrize("d", [16, 18])
def test_rows_that_are_not_multiples_of_16_bytes_go_one_by_one(d):
    rows, matrices = torch.randn(4, d), torch.randn(2, 8, d)
    assert is_aligned(rows, matrices.mT) == (d == 16)
    assert not is_aligned(torch.randn(d, 4).T, matrices.mT)
    assert not is_aligned(rows, torch.randn(2, 7, d).mT)
