"""The placement planner: what every placement keeps, how even it is, and how assignments and weights follow it."""

from __future__ import annotations

import itertools

import pytest
import torch

from moe_triton.distributed.replicas import placement as module
from moe_triton.distributed.replicas.placement import build_placement, moves, plan_placement, replica_of, replicate


def zipf(num_experts: int, exponent: float = 1.2, seed: int = 0) -> torch.Tensor:
    load = 1 / torch.arange(1, num_experts + 1, dtype=torch.float64) ** exponent
    return load[torch.randperm(num_experts, generator=torch.Generator().manual_seed(seed))]


def by_rank(placement) -> list[list[int]]:
    return placement.physical_to_logical.view(placement.num_ranks, -1).tolist()


def check(placement, load, num_slots, num_ranks):
    """What every placement keeps, recomputed from the map alone."""
    slots = placement.physical_to_logical.tolist()
    num_experts = len(load)
    assert (len(slots), placement.num_ranks) == (num_slots, num_ranks)
    counts = [slots.count(e) for e in range(num_experts)]
    assert min(counts) >= 1
    assert placement.replicas.tolist() == counts
    for e in range(num_experts):
        own = [slot for slot, expert in enumerate(slots) if expert == e]
        assert placement.logical_to_physical[e].tolist() == own + [-1] * (max(counts) - len(own))
    for rank, expected in zip(by_rank(placement), placement.rank_loads.tolist(), strict=True):
        assert sum(load[e].item() / counts[e] for e in rank) == pytest.approx(expected, rel=1e-12, abs=1e-300)
        for e in rank:  # two replicas share a rank only when there are more of them than ranks
            assert rank.count(e) <= -(-counts[e] // num_ranks)
    if num_slots <= num_experts * num_ranks:
        assert max(counts) <= num_ranks


def packings(items: tuple[int, ...], size: int):
    """Every way to split a sorted tuple into sets of `size` items."""
    if not items:
        yield []
        return
    for rest in itertools.combinations(range(1, len(items)), size - 1):
        first = [items[0], *(items[i] for i in rest)]
        left = tuple(items[i] for i in range(1, len(items)) if i not in rest)
        for others in packings(left, size):
            yield [first, *others]


def best_imbalance(load: list[float], num_slots: int, num_ranks: int) -> float:
    """The least max/mean rank load of any placement without two replicas on one rank, by trying all of them."""
    best = float("inf")
    for extra in itertools.combinations_with_replacement(range(len(load)), num_slots - len(load)):
        items = tuple(sorted([*range(len(load)), *extra]))
        share = [value / items.count(e) for e, value in enumerate(load)]
        for packing in packings(items, num_slots // num_ranks):
            if any(len(set(rank)) < len(rank) for rank in packing):
                continue  # two replicas on one rank
            best = min(best, max(sum(share[e] for e in rank) for rank in packing))
    return best / (sum(load) / num_ranks)


@pytest.mark.parametrize("ranks_per_node", [None, 2, 4])
@pytest.mark.parametrize(
    ("num_experts", "num_slots", "num_ranks"),
    [(1, 4, 4), (4, 4, 4), (4, 8, 4), (8, 12, 4), (5, 8, 4), (16, 24, 8), (64, 72, 8), (3, 24, 4), (7, 28, 4)],
)
def test_what_every_placement_keeps(num_experts, num_slots, num_ranks, ranks_per_node):
    for load in (
        zipf(num_experts, 2.0),
        torch.ones(num_experts),
        torch.zeros(num_experts, dtype=torch.int32),
        torch.nn.functional.one_hot(torch.tensor(num_experts - 1), num_experts),
        torch.rand(num_experts) ** 8,
    ):
        placement = plan_placement(load, num_slots, num_ranks, ranks_per_node=ranks_per_node)
        check(placement, load, num_slots, num_ranks)
        again = plan_placement(load, num_slots, num_ranks, ranks_per_node=ranks_per_node)
        assert torch.equal(placement.physical_to_logical, again.physical_to_logical)
        assert placement.imbalance >= 1 - 1e-12


def test_many_random_placements(monkeypatch):
    """Among them some where packing the heaviest first comes to a dead end."""
    heaviest_first, ends = module.pack_heaviest_first, []

    def watched(*arguments):
        found = heaviest_first(*arguments)
        ends.append(found is None)
        return found

    monkeypatch.setattr(module, "pack_heaviest_first", watched)
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(80):
        num_ranks, num_experts = draw(1, 6), draw(1, 12)
        num_slots = num_ranks * (-(-num_experts // num_ranks) + draw(0, 3))
        load = torch.rand(num_experts, generator=generator, dtype=torch.float64) ** draw(1, 10)
        check(plan_placement(load, num_slots, num_ranks), load, num_slots, num_ranks)
    assert any(ends)
    assert not all(ends)


@pytest.mark.parametrize(
    ("num_experts", "num_slots", "num_ranks"), [(4, 6, 2), (4, 6, 3), (3, 6, 3), (4, 8, 4), (5, 8, 2), (6, 8, 4)]
)
def test_evenness_against_brute_force(num_experts, num_slots, num_ranks):
    generator = torch.Generator().manual_seed(num_experts * num_slots * num_ranks)
    ratios = []
    for trial in range(12):
        load = torch.rand(num_experts, generator=generator, dtype=torch.float64) ** (1, 3, 6)[trial % 3]
        found = plan_placement(load, num_slots, num_ranks).imbalance
        ratios.append(found / best_imbalance(load.tolist(), num_slots, num_ranks))
    print(f"max/mean over the best possible: worst {max(ratios):.3f}, mean {sum(ratios) / len(ratios):.3f}")
    assert min(ratios) >= 1 - 1e-12
    assert max(ratios) <= 1.15
    assert sum(ratios) / len(ratios) <= 1.05


@pytest.mark.parametrize("exponent", [0.5, 0.8, 1.2])
@pytest.mark.parametrize(("num_experts", "num_slots", "num_ranks"), [(64, 72, 8), (128, 144, 16), (256, 288, 32)])
def test_evenness_against_no_replication(num_experts, num_slots, num_ranks, exponent):
    load = zipf(num_experts, exponent)
    plain = build_placement(torch.arange(num_experts), load, num_ranks).imbalance
    found = plan_placement(load, num_slots, num_ranks)
    print(f"max/mean {plain:.2f} -> {found.imbalance:.4f}")
    assert found.imbalance < 1.01
    assert plain > 1.15


def test_evenness_against_eplb():
    """The example of EPLB's README, 12 experts in 4 groups, 16 slots on 8 GPUs of 2 nodes, and the maps it prints."""
    loads = torch.tensor(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ]
    )
    maps = torch.tensor(
        [
            [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
            [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
        ]
    )
    for load, theirs in zip(loads, maps, strict=True):
        peer = build_placement(theirs, load, 8)
        found = plan_placement(load, 16, 8, ranks_per_node=4, num_groups=4)
        check(found, load, 16, 8)
        print(f"max/mean: EPLB {peer.imbalance:.3f}, ours {found.imbalance:.3f}")
        assert found.imbalance <= peer.imbalance


def test_replicas_minimise_the_largest_share():
    load = [9.0, 5.0, 3.0, 1.0]
    for slots in range(4, 11):
        best = min(
            max(value / (1 + extra.count(e)) for e, value in enumerate(load))
            for extra in itertools.combinations_with_replacement(range(4), slots - 4)
        )
        counts = replicate(load, slots, 100)
        assert sum(counts) == slots
        assert max(value / count for value, count in zip(load, counts, strict=True)) == pytest.approx(best)
    assert replicate([100.0, 1.0], 6, 3) == [3, 3]  # no more than ranks while others have fewer
    assert replicate([100.0, 1.0], 8, 3) == [5, 3]  # then by load again


def test_hierarchical_keeps_groups_and_replicas_in_a_node():
    load = zipf(64, 0.8)
    placement = plan_placement(load, 80, 16, ranks_per_node=4, num_groups=8)
    check(placement, load, 80, 16)
    nodes = placement.physical_to_logical.view(4, 20).tolist()
    homes = [{node for node in range(4) if e in nodes[node]} for e in range(64)]
    assert all(len(home) == 1 for home in homes)
    for group in range(8):
        assert len(set().union(*homes[group * 8 : group * 8 + 8])) == 1
    assert sorted(len({e // 8 for e in node}) for node in nodes) == [2, 2, 2, 2]
    # nodes do not divide the groups: everything is placed over all ranks, as without nodes
    whole = plan_placement(load, 80, 16, ranks_per_node=4, num_groups=2)
    assert torch.equal(whole.physical_to_logical, plan_placement(load, 80, 16).physical_to_logical)
    assert whole.imbalance <= placement.imbalance


def test_replica_of_spreads_tokens():
    load = torch.tensor([6.0, 1.0, 1.0, 0.5])
    placement = plan_placement(load, 8, 4)
    experts = torch.randint(0, 4, (1000, 2), dtype=torch.int32)
    experts[::10, 1] = -1
    experts[5, 0] = 4
    physical = replica_of(experts, placement)
    assert physical.dtype == torch.int32
    skipped = (experts < 0) | (experts >= 4)
    assert torch.equal(physical == -1, skipped)
    assert torch.equal(placement.physical_to_logical[physical[~skipped].long()], experts[~skipped])
    # a hot expert's tokens: round robin, so that its replicas differ by at most one
    hot = replica_of(torch.zeros(999, 1, dtype=torch.int64), placement)
    assert hot.dtype == torch.int64
    counts = torch.bincount(hot.view(-1), minlength=8)
    counts = counts[counts > 0]
    assert len(counts) == placement.replicas[0] > 1
    assert counts.max() - counts.min() <= 1
    assert replica_of(torch.zeros(0, 2, dtype=torch.int32), placement).shape == (0, 2)


def test_replica_of_reads_nothing_on_the_host():
    placement = plan_placement(torch.ones(4), 8, 4).to("meta")  # a host read of a meta tensor raises
    assert replica_of(torch.zeros(6, 2, dtype=torch.int32, device="meta"), placement).shape == (6, 2)


def test_real_loads_follow_the_expected_ones():
    load = zipf(32, 1.0)
    placement = plan_placement(load, 48, 8)
    experts = torch.multinomial(load, 20_000, replacement=True)[:, None]
    counts = torch.bincount(replica_of(experts, placement).view(-1), minlength=48).view(8, -1).sum(1)
    expected = placement.rank_loads / placement.rank_loads.sum() * 20_000
    assert (counts / expected - 1).abs().max() < 0.06
    assert placement.imbalance < 1.01


def apply(copies, weights):
    """The weights after the copies, all read before any is written."""
    result = weights.clone()
    for source, destination in copies:
        result[destination] = weights[source]
    return result


def crossings(copies, placement):
    width = placement.slots_per_rank
    return sum(source // width != destination // width for source, destination in copies)


@pytest.mark.parametrize("ranks_per_node", [None, 2])
def test_moves_bring_every_expert_where_it_belongs(ranks_per_node):
    logical = torch.randn(24, 3)
    old = plan_placement(zipf(24, 1.2, seed=1), 32, 8, ranks_per_node=ranks_per_node)
    load = zipf(24, 1.2, seed=2)
    free = plan_placement(load, 32, 8, ranks_per_node=ranks_per_node)
    kept = plan_placement(load, 32, 8, ranks_per_node=ranks_per_node, previous=old)
    for new in (free, kept):
        check(new, load, 32, 8)
        copies = moves(old, new)
        assert torch.equal(
            apply(copies, logical[old.physical_to_logical.long()]), logical[new.physical_to_logical.long()]
        )
        changed = (old.physical_to_logical != new.physical_to_logical).nonzero().view(-1).tolist()
        assert [destination for _, destination in copies] == changed
        # no fewer can cross: an expert that a rank lacks has to come from elsewhere
        needed = sum(len(set(after) - set(before)) for before, after in zip(by_rank(old), by_rank(new), strict=True))
        assert crossings(copies, new) == needed
    assert sorted(kept.rank_loads.tolist()) == pytest.approx(sorted(free.rank_loads.tolist()))
    assert len(moves(old, kept)) == crossings(moves(old, kept), kept) < crossings(moves(old, free), free)
    assert moves(old, old) == []


def test_a_plan_that_only_renames_moves_nothing():
    load = zipf(16, 0.7)
    old = plan_placement(load, 24, 8)
    shuffled = old.physical_to_logical.view(8, 3).flip(0, 1).reshape(-1)
    other = build_placement(shuffled, load, 8)
    assert len(moves(other, old)) > 0
    assert moves(other, plan_placement(load, 24, 8, previous=other)) == []


def test_moves_spread_over_the_sources():
    old = build_placement(torch.tensor([0, 1, 0, 2, 3, 4, 3, 4]), torch.ones(5), 4)
    new = build_placement(torch.tensor([0, 1, 0, 2, 0, 3, 0, 4]), torch.ones(5), 4)
    assert moves(old, new) == [(0, 4), (4, 5), (2, 6)]  # 3 moves within its rank; expert 0 comes from both replicas


def test_to_moves_every_tensor():
    placement = plan_placement(torch.ones(4), 4, 2)
    there = placement.to("meta")
    assert {there.physical_to_logical.device.type, there.replicas.device.type} == {"meta"}
    assert {there.logical_to_physical.device.type, there.rank_loads.device.type} == {"meta"}
    with pytest.raises(ValueError, match="placement: got device meta, wanted cpu"):
        replica_of(torch.zeros(2, 1, dtype=torch.int32), there)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.ones(4), 6, 4), {}, "num_slots: got 6, wanted a multiple of the 4 ranks"),
        ((torch.ones(8), 4, 4), {}, "num_slots: got 4, wanted at least 8"),
        ((torch.ones(8), 8, 0), {}, "num_ranks: got 0"),
        ((torch.ones(8), 8, 4), {"ranks_per_node": 3}, "ranks_per_node: got 3, wanted a divisor of the 4 ranks"),
        ((torch.ones(8), 8, 4), {"num_groups": 3}, "num_groups: got 3, wanted a divisor of the 8 experts"),
        ((torch.ones(2, 4), 8, 4), {}, r"load_E: got shape \[2, 4\], wanted \[E\]"),
        ((torch.tensor([1.0, -1.0]), 2, 1), {}, "load_E: got -1.0 for expert 1"),
        ((torch.tensor([float("nan"), 1.0]), 2, 1), {}, "load_E: got nan for expert 0"),
        ((torch.ones(0), 2, 1), {}, "load_E: got no experts"),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        plan_placement(*arguments, **options)


def test_bad_types_and_maps():
    with pytest.raises(TypeError, match="load_E: got list, wanted a Tensor"):
        plan_placement([1.0, 2.0], 2, 1)
    with pytest.raises(TypeError, match=r"num_slots: got 2\.0, wanted an int"):
        plan_placement(torch.ones(2), 2.0, 1)
    with pytest.raises(ValueError, match="physical_to_logical: got no slot for expert 1"):
        build_placement(torch.tensor([0, 0]), torch.ones(2), 1)
    with pytest.raises(ValueError, match="physical_to_logical: got ids 0 to 2, wanted 0 to 1"):
        build_placement(torch.tensor([0, 2]), torch.ones(2), 1)
    with pytest.raises(ValueError, match="num_ranks: got 2, wanted a divisor of the 3 slots"):
        build_placement(torch.tensor([0, 1, 1]), torch.ones(2), 2)
    small, large = plan_placement(torch.ones(2), 2, 2), plan_placement(torch.ones(2), 4, 2)
    with pytest.raises(ValueError, match=r"new: got \(experts, slots, ranks\) \(2, 4, 2\), wanted \(2, 2, 2\)"):
        moves(small, large)
    with pytest.raises(ValueError, match=r"previous: got \(experts, slots, ranks\) \(2, 2, 2\), wanted \(2, 4, 2\)"):
        plan_placement(torch.ones(2), 4, 2, previous=small)
