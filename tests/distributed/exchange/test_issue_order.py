"""What is issued before what: exchanges before the work that hides them, and no host read where sizes are fixed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_triton.dispatch import dispatch
from moe_triton.distributed import ExpertParallel
from moe_triton.distributed.exchange import channel
from moe_triton.distributed.exchange.stages import ExchangedLayer
from moe_triton.layers.experts import FeedForward
from tests.helpers import parity
from tests.helpers.faults import fresh_groups
from tests.helpers.parity import HIDDEN, Case
from tests.helpers.ranks import products

CHUNKS = 3


def record(mode: str, sizes: dict[str, int] | None = None, **exchange) -> tuple[list[str], list[str]]:
    """The events of one forward and one backward, of a layer with a shared expert."""
    events: list[str] = []
    groups = fresh_groups(**(sizes or {"ep": 4}))
    parallel = ExpertParallel(groups, mode=mode, **{"chunks": CHUNKS, "listener": events.append, **exchange})
    case = Case([6] * 4, layer={"shared_intermediate_size": 8, "capacity_factor": 1.0, "aux_loss_weight": 0.1})
    layer = parity.make_layer(case, parallel)
    original, start_copy = FeedForward.forward, channel.copy_to_host

    def copy_to_host(tensor):
        arrived, elements = start_copy(tensor)
        return arrived, lambda: [events.append("host read"), elements()][1]

    def shared(self, x):
        events.append("shared expert")
        return original(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeedForward, "forward", shared)
        patch.setattr(channel, "copy_to_host", copy_to_host)
        x = torch.randn(6, HIDDEN, dtype=case.dtype, requires_grad=True)
        layer(x)  # the first call of a group exchanges who its processes are
        events.clear()
        out = layer(x)
        forward = list(events)
        events.clear()
        (out.output.sum() + out.aux_loss).backward()
    return forward, events


def in_order(events: list[str], *wanted: str) -> bool:
    """Whether the wanted events happen once each, in this order."""
    assert all(events.count(event) == 1 for event in wanted), (wanted, events)
    places = [events.index(event) for event in wanted]
    return places == sorted(places)


MODES = ("dropless", "capacity", "bounded", "allgather")


@pytest.mark.parametrize("mode", MODES)
def test_exchanges_are_issued_before_the_work_that_hides_them(four_ranks, mode):
    orders = four_ranks.run(record, mode)
    assert all(order == orders[0] for order in orders), "all ranks issue the same order"
    forward, backward = orders[0]
    counts = ["issue exchange of counts", "issue exchange of further counts"] if mode == "dropless" else []
    rows = [f"issue rows of chunk {chunk}" for chunk in range(CHUNKS)]
    early = ["shared expert", rows[0]] if mode == "dropless" else [rows[0], "shared expert"]
    assert in_order(forward, *counts, *early, "experts 0")
    if mode == "dropless":  # each of both is read when nothing is left to do without it
        reads = [i for i, event in enumerate(forward) if event == "host read"]
        assert len(reads) == 2
        assert forward.index("shared expert") < reads[0] < reads[1] < forward.index(rows[0])
    for chunk in range(CHUNKS):
        assert in_order(forward, rows[chunk], f"experts {chunk}", f"issue results of chunk {chunk}")
    for chunk in range(CHUNKS - 1):
        assert in_order(forward, f"issue rows of chunk {chunk + 1}", f"experts {chunk}")
        assert in_order(forward, f"issue results of chunk {chunk}", f"experts {chunk + 1}")
        assert in_order(backward, f"issue output gradients of chunk {chunk + 1}", f"row gradients {chunk}")
    for chunk in range(CHUNKS):
        assert in_order(backward, f"row gradients {chunk}", f"issue row gradients of chunk {chunk}", "weight gradients")
    assert backward.count("weight gradients") == 1, "one product over all chunks"
    exchanges = [[e for e in events if e.startswith("issue ") and "chunk" in e] for events in (forward, backward)]
    assert [len(found) for found in exchanges] == [2 * CHUNKS] * 2, "ids and weights travel in the rows' tails"
    assert "host read" not in backward
    assert forward.count("issue exchange of counts") == (mode == "dropless")
    assert not any("counts" in event for event in backward), "backward uses the forward's counts"


def of_many_levels(chunks: int) -> list[tuple[list[str], list[str]]]:
    """In two levels, and with slices of experts."""
    two_levels = record("dropless", chunks=chunks, ranks_per_node=2)
    return [two_levels, record("dropless", {"ep": 2, "etp": 2}, chunks=chunks)]


@pytest.mark.parametrize("chunks", [1, CHUNKS])
def test_every_level_is_counted_before_rows_travel(four_ranks, chunks):
    orders = four_ranks.run(of_many_levels, chunks)
    assert all(order == orders[0] for order in orders)
    for (forward, backward), levels in zip(orders[0], (2, 1), strict=True):
        assert forward.count("issue exchange of counts") == levels
        counted = max(i for i, event in enumerate(forward) if re.match("issue exchange of .*counts", event))
        reads = [i for i, event in enumerate(forward) if event == "host read"]
        assert counted < forward.index("shared expert"), "the host has work while the counts travel"
        assert max(reads) < forward.index("issue rows of chunk 0"), "no chunk's rows are waited for by the host"
        assert forward.count("issue rows of chunk 0") == 1 + chunks, "and inside, once for each chunk"
        assert "host read" not in backward


class HostReads:
    """Counts what the exchange does that waits for a device: reads of a tensor's elements, and copies to the host."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for name in ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__"):
            patch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))

    def counted(self, function):
        def call(*args, **kwargs):
            caller = sys._getframe(1)
            if "distributed" in Path(caller.f_code.co_filename).parts:
                self.count += 1
            return function(*args, **kwargs)

        return call


def host_reads(mode: str, most: int | None, sizes: dict[str, int] | None = None, **exchange) -> int:
    """In a forward and a backward, leaving out what is compared on CPUs alone."""
    options = {"chunks": 2, **exchange}
    parallel = ExpertParallel(fresh_groups(**(sizes or {"ep": 4})), mode=mode, max_tokens_per_rank=most, **options)
    case = Case([6] * 4, layer={"capacity_factor": 1.0, "aux_loss_weight": 0.1})
    layer = parity.make_layer(case, parallel)
    x = torch.randn(6, HIDDEN, dtype=case.dtype, requires_grad=True)
    layer(x)  # the first call compares configurations, on every device
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel.Channel, "agree", lambda self, what, phase, device: 1)
        reads = HostReads(patch)
        out = layer(x)
        (out.output.sum() + out.aux_loss).backward()
    return reads.count


@pytest.mark.parametrize(("mode", "most"), products(mode=MODES, most=(6, None)))
def test_host_reads(four_ranks, mode, most):
    # of the first chunk's counts, and of the others', which have come by then
    wanted = 2 if mode == "dropless" else int(most is None)
    assert four_ranks.run(host_reads, mode, most) == [wanted] * 4


def host_reads_with_slices(mode: str) -> int:
    return host_reads(mode, 6, {"ep": 2, "etp": 2})


@pytest.mark.parametrize("mode", MODES)
def test_host_reads_with_slices_of_experts(four_ranks, mode):
    wanted = 3 if mode == "dropless" else 0  # one more for the sizes, which differ between the slices' ranks
    assert four_ranks.run(host_reads_with_slices, mode) == [wanted] * 4


def host_reads_by_chunks() -> list[tuple[int, int]]:
    """In two levels, and with slices of experts, by the number of chunks."""
    sliced = {"ep": 2, "etp": 2}
    return [
        (host_reads("dropless", None, chunks=chunks, ranks_per_node=2),
         host_reads("dropless", None, sliced, chunks=chunks))
        for chunks in (1, 2, 4)
    ]  # fmt: skip


def test_host_reads_do_not_grow_with_the_chunks(four_ranks):
    # of each level: the first chunk's counts, and the others' where there are some; and the slices' sizes
    assert four_ranks.run(host_reads_by_chunks) == [[(2, 2), (4, 3), (4, 3)]] * 4


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


class NoExperts:
    """The innermost stage of an exchange, which runs no operator."""

    num_experts, backend = 2, "torch"

    def description(self):
        return {}

    def forward(self, x, ids, weights, assignments, saved):
        self.weights = weights
        return x

    def start_backward(self, call, grad, saved):
        return lambda: (grad, self.weights)

    def backward_weights(self, wanted, saved):
        return []


def operators() -> tuple[int, int]:
    """Of the exchange alone, forward and backward."""
    parallel, layer = ExpertParallel(fresh_groups(ep=4)), ExchangedLayer(name="layer", num_experts=8)
    x = torch.randn(6, HIDDEN, requires_grad=True)
    dispatched, weights = dispatch(torch.arange(12).view(6, 2) % 8, 8), torch.rand(6, 2)

    def forward() -> torch.Tensor:
        return parallel.exchange(x, weights, dispatched, NoExperts(), [], layer)

    forward()  # the first call of a group exchanges who its processes are
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel.Channel, "agree", lambda self, what, phase, device: 1)
        with Operators() as forwards:
            out = forward()
        with Operators() as backwards:
            out.backward(torch.ones_like(out))
    return forwards.count, backwards.count


def test_few_operators(four_ranks):
    # each takes a GPU's host microseconds, however few rows there are
    for forward, backward in four_ranks.run(operators):
        assert forward <= 90
        assert backward <= 42
