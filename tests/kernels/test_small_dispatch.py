"""One launch for a few assignments: what the permutation and the tile tables give in four, to the last integer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_triton import MoE, dispatch, reference
from moe_triton.backends.triton.dispatch import build_small_dispatch
from moe_triton.records import TiledDispatch
from moe_triton_kernels.small_dispatch import MAX_SLOTS, small_dispatch
from moe_triton_kernels.tiles import tile_tables
from tests.helpers.problems import random_choices

device = "cuda" if torch.cuda.is_available() else "cpu"
FIELDS = ("counts", "offsets", "source", "position")


def check(experts: torch.Tensor, num_experts: int) -> None:
    *found, tiles = small_dispatch(experts, num_experts)
    expected = reference.dispatch(experts, num_experts)
    for tensor, name in zip(found, FIELDS, strict=True):
        assert torch.equal(tensor, getattr(expected, name)), name
        assert tensor.dtype == torch.int32
    plain = tile_tables(found[1], experts.numel())
    assert tiles.places == plain.places
    assert torch.equal(tiles.num_tiles, plain.num_tiles)
    for number, table, other in zip(tiles.num_tiles.tolist(), tiles.tables, plain.tables, strict=True):
        assert table.shape == other.shape
        assert table.data_ptr() % 16 == tiles.tables[0].data_ptr() % 16
        assert torch.equal(table[:number], other[:number])


@settings(max_examples=20, deadline=None)
@given(
    num_tokens=st.integers(1, 130),
    top_k=st.integers(1, 7),
    num_experts=st.sampled_from([1, 3, 8, 64, 130]),
    one_expert=st.booleans(),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_any_small_number(num_tokens: int, top_k: int, num_experts: int, one_expert: bool, dtype: torch.dtype) -> None:
    experts = torch.randint(-1, num_experts + 1, (num_tokens, top_k), device=device, dtype=dtype)
    check(experts.clamp(0, 0) if one_expert else experts, num_experts)


def test_the_most_assignments_and_those_in_the_way_of_one_launch() -> None:
    check(random_choices(MAX_SLOTS // 8, 8, 128).to(device), 128)
    assert build_small_dispatch(torch.zeros(MAX_SLOTS + 1, 1, dtype=torch.int32, device=device), 4) is None
    assert build_small_dispatch(torch.zeros(0, 2, dtype=torch.int32, device=device), 4) is None


def test_the_public_dispatch_takes_it_where_it_may() -> None:
    experts = random_choices(9, 2, 5).to(device)
    assert isinstance(dispatch(experts, 5, backend="triton"), TiledDispatch)
    for options in ({"capacity": 3, "backend": "triton"}, {"backend": "torch"}):
        assert not isinstance(dispatch(experts, 5, **options), TiledDispatch)


def test_a_layer_without_gradients_makes_no_tile_tables_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_triton.backends.triton import problem

    layer = MoE(16, 8, 4, 2, backend="triton", device=device)
    x = torch.randn(6, 16, device=device)
    expected = layer(x).output.detach()
    made = []
    monkeypatch.setattr(problem, "tile_tables", lambda *arguments: made.append(arguments) or tile_tables(*arguments))
    with torch.no_grad():
        assert torch.equal(layer(x).output, expected)
    assert not made
    layer(x)
    assert len(made) == 1
