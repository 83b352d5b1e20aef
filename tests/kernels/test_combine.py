"""Combine against a gather and a sum in float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_triton_kernels.combine import combine
from tests.helpers.compare import TOLERANCE, assert_close, relative_rms

device = "cuda" if torch.cuda.is_available() else "cpu"


def make_position(num_tokens: int, top_k: int, dropped: float) -> Tensor:
    """A random permutation of the rows, with -1 at some places; the rows of those places stay unread."""
    position = torch.randperm(num_tokens * top_k).view(num_tokens, top_k)
    return torch.where(torch.rand(num_tokens, top_k) < dropped, -1, position).int().to(device)


def expected_sum(rows: Tensor, position: Tensor) -> Tensor:
    gathered = rows.double()[position.clamp_min(0).long()]
    return torch.where((position >= 0)[:, :, None], gathered, 0.0).sum(1)


@settings(max_examples=30, deadline=None)
@given(
    num_tokens=st.integers(1, 40),
    top_k=st.sampled_from([1, 2, 3, 8, 9, 20]),
    hidden=st.sampled_from([1, 7, 64, 256, 300, 600]),
    dropped=st.sampled_from([0.0, 0.4, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_matches_a_gather_and_a_sum(
    num_tokens: int, top_k: int, hidden: int, dropped: float, dtype: torch.dtype
) -> None:
    rows = torch.randn(num_tokens * top_k, hidden).to(dtype).to(device)
    position = make_position(num_tokens, top_k, dropped)
    out = combine(rows, position, dtype)
    assert out.dtype == dtype
    assert_close(out, expected_sum(rows, position))


def test_the_comparison_fails_on_wrong_results() -> None:
    rows, position = torch.randn(64, 32, device=device), make_position(32, 2, 0.0)
    expected = expected_sum(rows, position)
    dropped = position.clone()
    dropped[5, 1] = -1
    for wrong in (
        torch.zeros_like(expected),
        combine(rows, position.flip(0), torch.float32),
        combine(rows, dropped, torch.float32),
    ):
        assert relative_rms(wrong, expected) > 100 * TOLERANCE[torch.float32]


def test_rows_at_no_position_are_not_read() -> None:
    position = make_position(20, 3, 0.5)
    rows = torch.randn(60, 40, device=device)
    unused = torch.ones(60, dtype=torch.bool, device=device)
    unused[position[position >= 0].long()] = False
    assert 0 < unused.sum() < 60
    poisoned = torch.where(unused[:, None], float("nan"), rows)
    assert torch.equal(combine(poisoned, position, torch.float32), combine(rows, position, torch.float32))


def test_the_sum_is_in_fp32_and_cast_once() -> None:
    # in half precision 2048 + 1 is 2048: added one by one the ones would vanish
    rows = torch.tensor([2048.0] + [1.0] * 7, dtype=torch.float16, device=device)[:, None].expand(8, 16)
    position = torch.arange(8, dtype=torch.int32, device=device)[None, :]
    assert combine(rows, position, torch.float32).tolist() == [[2055.0] * 16]
    assert combine(rows, position, torch.float16).tolist() == [[2056.0] * 16]  # the nearest there is


def test_the_choices_are_added_in_their_order() -> None:
    rows = torch.randn(160, 32, device=device)
    position = torch.randperm(160, device=device).int().view(40, 4)
    in_order = torch.zeros(40, 32, device=device)
    for choice in position.long().unbind(1):
        in_order += rows[choice]
    assert torch.equal(combine(rows, position, torch.float32), in_order)
    assert not torch.equal(combine(rows, position.flip(1), torch.float32), in_order)


def test_strided_rows_and_empty_shapes() -> None:
    rows, position = torch.randn(24, 48, device=device), make_position(12, 2, 0.2)
    whole = combine(rows, position, torch.float32)
    assert torch.equal(combine(rows[:, 8:40], position, torch.float32), whole[:, 8:40])
    assert torch.equal(combine(rows.T.contiguous().T, position, torch.float32), whole)
    assert combine(rows[:0], position[:0], torch.float32).shape == (0, 48)
    assert combine(rows[:, :0], position, torch.float32).shape == (12, 0)
