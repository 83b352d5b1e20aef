"""The permutation kernels against `reference.dispatch`: bitwise, for every order and capacity."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_triton import reference
from moe_triton.backends.triton.dispatch import build_dispatch
from moe_triton_kernels import permutation

device = "cuda" if torch.cuda.is_available() else "cpu"


def make_experts(num_tokens: int, top_k: int, num_experts: int, kind: str) -> Tensor:
    """Distinct experts per token where that is possible; `kind` says how they are spread."""
    if kind == "one":
        experts = torch.full((num_tokens, top_k), num_experts // 2)
    elif kind == "skewed":
        experts = (torch.rand(num_tokens, top_k).square() * num_experts).long()
    else:
        experts = torch.rand(num_tokens, max(num_experts, top_k)).argsort(-1)[:, :top_k] % num_experts
    if kind == "invalid":
        experts = torch.where(
            torch.rand(num_tokens, top_k) < 0.3, torch.tensor([-1, num_experts, -7])[experts % 3], experts
        )
    return experts.to(device)


def check(
    experts: Tensor,
    num_experts: int,
    capacity: int | None = None,
    groups: int = 1,
    by_choice: bool = False,
    keys: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    actual = build_dispatch(experts, num_experts, capacity, groups, by_choice, keys)
    expected = reference.dispatch(
        experts, num_experts, capacity=capacity, capacity_groups=groups, by_choice=by_choice, keys=keys
    )
    names = ("counts", "offsets", "source", "position")
    for name, tensor in zip(names, actual, strict=True):
        assert tensor.dtype == torch.int32
        assert torch.equal(tensor, getattr(expected, name)), name
    return actual


@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.integers(0, 60),
    groups=st.integers(1, 5),
    top_k=st.integers(1, 8),
    num_experts=st.sampled_from([1, 2, 5, 16, 33, 64]),
    kind=st.sampled_from(["even", "one", "skewed", "invalid"]),
    capacity=st.sampled_from([None, 0, 1, 3, 8, 1000]),
    order=st.sampled_from(["position", "choice", "keys"]),
    wide=st.booleans(),
)
def test_matches_the_reference(
    num_tokens: int, groups: int, top_k: int, num_experts: int, kind: str, capacity: int | None, order: str, wide: bool
) -> None:
    num_tokens -= num_tokens % groups
    experts = make_experts(num_tokens, top_k, num_experts, kind).to(torch.int64 if wide else torch.int32)
    # few different keys, so that ties are common
    keys = torch.randint(0, 6, (num_tokens, top_k), device=device) / 3.0 if order == "keys" else None
    check(experts, num_experts, capacity, groups, order == "choice", keys)


def test_the_orders_drop_differently() -> None:
    experts = make_experts(60, 2, 4, "skewed")
    keys = torch.rand(60, 2, device=device)
    by_position = check(experts, 4, 10)[3]
    by_choice = check(experts, 4, 10, by_choice=True)[3]
    by_key = check(experts, 4, 10, keys=keys)[3]
    by_group = check(experts, 4, 10, groups=3)[3]
    kept = {tuple((position >= 0).flatten().tolist()) for position in (by_position, by_choice, by_key, by_group)}
    assert len(kept) == 4
    assert all(0 < sum(flags) < 120 for flags in kept)


@pytest.mark.parametrize(("num_experts", "capacity"), [(256, None), (256, 2), (1100, None)])
def test_many_experts(num_experts: int, capacity: int | None) -> None:
    check(make_experts(40, 8, num_experts, "skewed"), num_experts, capacity, groups=2)


@pytest.fixture
def nothing_kept() -> Iterator[None]:
    """The sizes of launches are chosen anew, and forgotten after the test."""
    cached = (permutation.chunks_of, permutation._count_launches, permutation._place_launch)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("capacity", [None, 7])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("by_choice", [False, True])
def test_chunks_of_several_blocks_and_scans_of_several_parts(
    capacity: int | None, groups: int, by_choice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(permutation, "BLOCK", 16)
    monkeypatch.setattr(permutation, "MAX_CHUNKS", 12)
    monkeypatch.setattr(permutation, "SCAN_CHUNKS", 4)
    assert permutation.chunks_of(372 // groups, groups)[0] > 1
    check(make_experts(93, 4, 5, "invalid"), 5, capacity, groups, by_choice)


def test_keys_with_nan_and_infinities() -> None:
    experts = make_experts(32, 2, 3, "skewed")
    odd = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0], device=device)
    keys = odd[torch.randint(0, 6, (32, 2), device=device)]
    check(experts, 3, 4, 2, keys=keys)


def test_ids_that_would_wrap_into_range_are_skipped() -> None:
    experts = torch.tensor([[0, 2**32], [1, -(2**32) + 1], [2**31, 1]], device=device)
    position = check(experts, 2)[3]
    assert (position >= 0).tolist() == [[True, False], [True, False], [False, True]]


def test_strided_experts() -> None:
    experts = make_experts(30, 3, 7, "even")
    strided = experts.T.contiguous().T
    assert not strided.is_contiguous()
    for a, b in zip(check(strided, 7), check(experts, 7), strict=True):
        assert torch.equal(a, b)
