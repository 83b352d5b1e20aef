"""Gathers of rows and sums of each token's rows on a CPU, by compiled loops and by torch."""

from __future__ import annotations

import pytest
import torch

from moe_triton.backends.torch import fused
from moe_triton.backends.torch.rows import round_rows, sum_rows, take_rows, widen_rows
from tests.helpers.compare import TOLERANCE, assert_close

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["0", "1"], ids=["by torch", "by loops"])
def by_loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "1":
        pytest.importorskip("numba")
    monkeypatch.setenv(fused.VARIABLE, request.param)
    return request.param == "1"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 5, 64])
def test_rows_are_taken(columns: int, dtype: torch.dtype, by_loops: bool) -> None:
    source, index = torch.randn(40, columns).to(dtype), torch.randint(40, (150,), dtype=torch.int32)
    out = torch.full((151, columns), torch.nan).to(dtype)
    take_rows(source, index, out[:150])
    assert torch.equal(out[:150], source[index.long()])
    assert out[150].isnan().all()


def test_rows_are_taken_from_a_part(by_loops: bool) -> None:
    source, out = torch.randn(9, 20)[:, 3:10], torch.empty(2, 7)
    take_rows(source, torch.tensor([8, 0], dtype=torch.int32), out)
    assert torch.equal(out, source[[8, 0]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 3, 4, 9])
def test_sums(top_k: int, dtype: torch.dtype, by_loops: bool) -> None:
    num_tokens, num_rows = 19, 23
    rows = torch.randn(num_rows + 1, 33).to(dtype)
    position = torch.randint(-1, num_rows + 1, (num_tokens, top_k), dtype=torch.int32)
    position[3] = -1
    rows[num_rows] = torch.nan  # stands in for what has no row
    expected = rows.double()
    expected[num_rows] = 0
    expected = expected[position.long()]
    found = sum_rows(rows, position, num_rows)
    assert torch.equal(found, sum_rows(rows[:num_rows], position, num_rows)), "without a row for what has none"
    assert found.dtype == dtype
    assert not found[3].any()
    assert_close(found, expected.sum(1), tolerance=TOLERANCE[dtype])
    with pytest.raises(AssertionError):
        assert_close(found, expected[:, 1:].sum(1), tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_weighted_sums_have_the_bits_of_weighted_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a row gets its weight before it is sent, or when it is summed."""
    pytest.importorskip("numba")
    monkeypatch.setenv(fused.VARIABLE, "1")
    rows, weights = torch.randn(30, 33).to(dtype), torch.rand(10, 3)
    position = torch.randperm(30, dtype=torch.int32).view(10, 3)
    weight_of_row = torch.empty(30).index_put_((position.long(),), weights)
    found = sum_rows(rows, position, weights=weights)
    assert torch.equal(found, sum_rows((rows * weight_of_row[:, None]).to(dtype), position))
    assert not torch.equal(found, sum_rows(rows, position))


def test_a_row_without_a_choice_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero times infinity would not be zero."""
    pytest.importorskip("numba")
    monkeypatch.setenv(fused.VARIABLE, "1")
    rows = torch.tensor([[torch.inf], [2.0], [3.0]])
    position = torch.tensor([[1, -1, 2], [-1, -1, -1], [0, 1, -1]], dtype=torch.int32)
    assert sum_rows(rows, position).tolist() == [[5.0], [0.0], [torch.inf]]


@pytest.mark.parametrize("shape", [(0, 3, 4), (5, 0, 4), (5, 3, 0)])
def test_empty_ones(shape: tuple[int, int, int], by_loops: bool) -> None:
    num_tokens, top_k, columns = shape
    found = sum_rows(torch.randn(8, columns), torch.zeros(num_tokens, top_k, dtype=torch.int32))
    assert torch.equal(found, torch.zeros(num_tokens, columns))


def test_the_bits_do_not_depend_on_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    monkeypatch.setenv(fused.VARIABLE, "1")
    rows, position, weights = torch.randn(200, 33), torch.randint(200, (70, 5), dtype=torch.int32), torch.rand(70, 5)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(sum_rows(rows, position, weights=weights))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(sum_rows(rows, position[7:8], weights=weights[7:8]), results[0][7:8])


def test_rows_are_widened_and_rounded() -> None:
    pytest.importorskip("numba")
    rows, addend = torch.randn(2, 401, 83).bfloat16()  # more numbers than a thread takes at a time, and an odd number
    wide = widen_rows(rows)
    assert torch.equal(wide, rows.float())
    assert torch.equal(round_rows(wide / 3, None), (wide / 3).bfloat16())
    assert torch.equal(round_rows(wide / 3, addend), (wide / 3 + addend).bfloat16())
    assert not torch.equal(round_rows(wide / 3, addend), round_rows(wide / 3, None))
