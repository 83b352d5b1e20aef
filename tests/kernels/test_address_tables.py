"""Tables of addresses: right, kept per stream, and never shared with a graph that is being captured."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moe_triton_kernels import address_tables
from moe_triton_kernels.address_tables import AT_A_TIME, address_table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("size", [1, AT_A_TIME - 1, AT_A_TIME, 3 * AT_A_TIME + 1])
def test_a_table_holds_the_addresses(size: int) -> None:
    addresses = tuple((0x7F0000000000 + 16 * torch.randperm(10**6)[:size]).tolist())
    table = address_table(addresses, DEVICE)
    assert table.dtype == torch.int64
    assert tuple(table.tolist()) == addresses
    assert address_table(addresses, DEVICE) is table


def test_streams_and_captured_graphs_have_tables_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fake streams: what was filled on one is not taken on another, nor anything from or for a capture."""
    state = SimpleNamespace(stream=1, capturing=False)
    filled: list[tuple[int, bool]] = []

    def fill(addresses: tuple[int, ...], device: torch.device) -> Tensor:
        filled.append((state.stream, state.capturing))
        return torch.tensor(addresses)

    monkeypatch.setattr(address_tables, "fill_table", fill)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=state.stream))
    address_tables.kept_table.cache_clear()

    def table(stream: int, capturing: bool = False) -> Tensor:
        state.stream, state.capturing = stream, capturing
        return address_table((16, 32), torch.device("cuda"))

    first = table(1)
    assert table(1) is first
    other = table(2)
    assert other is not first
    assert table(2) is other
    captured = [table(1, capturing=True) for _ in range(2)]
    assert captured[0] is not captured[1]
    assert first is not captured[0]
    assert table(1) is first
    assert filled == [(1, False), (2, False), (1, True), (1, True)]
    address_tables.kept_table.cache_clear()
